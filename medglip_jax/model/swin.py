"""Swin Transformer v1 (arXiv 2103.14030), in the form that GLIP uses: features of stages 2 to 4, each with a norm."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from ml_collections import ConfigDict

from medglip_jax.model.blocks import Block, run_blocks
from medglip_jax.model.layers import Conv, Dense, DropPath, gelu, layer_norm, torch_bias_init, torch_kernel_init
from medglip_jax.model.remat import NONE
from medglip_jax.model.routing import PLACES, SLOTS, move_by, selected
from medglip_jax.parallel.activations import MAP, WHOLE_MAP, constrain

Array = jax.Array

_EPSILON = 1e-5
_init = nn.initializers.truncated_normal(0.02)


def relative_position_index(window: int) -> np.ndarray:
    """Rows of the relative position table for each (query, key) pair of a window: int64[window**2, window**2]."""
    y, x = np.divmod(np.arange(window * window), window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def shifted_window_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """What a token of a shifted window may attend to.

    Args:
        height, width: of the padded feature map, multiples of `window`.
        window: window side in tokens.
        shift: how far the map was rolled up and left.

    Returns:
        float32[num_windows, window**2, window**2]: 0 where both tokens are neighbours in the image, -100 where
        only the roll brought them together.
    """

    def bands(size: int) -> np.ndarray:
        return np.digitize(np.arange(size), [size - window, size - shift])

    regions = 3 * bands(height)[:, None] + bands(width)
    regions = regions.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    regions = regions.reshape(-1, window * window)  # [windows, tokens]
    return np.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0).astype(np.float32)


def partition_windows(x: Array, window: int) -> Array:
    """Cuts [B, H, W, C] into [B, windows, window**2, C], row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, window * window, c)


def merge_windows(windows: Array, height: int, width: int) -> Array:
    """The inverse of `partition_windows`."""
    b, _, tokens, c = windows.shape
    window = round(tokens**0.5)
    x = windows.reshape(b, height // window, width // window, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, c)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, shifted by `shift` tokens, with a learned relative position bias."""

    num_heads: int
    window: int
    shift: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> the same
        _, h, w, c = x.shape
        window, heads = self.window, self.num_heads
        padding = (-h % window, -w % window)
        x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
        padded_h, padded_w = x.shape[1:3]
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
        x = partition_windows(x, window)  # [B, N, T, C]

        qkv = Dense(3 * c, kernel_init=_init, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*qkv.shape[:-1], 3, heads, c // heads)
        qkv = constrain(qkv, "batch", "height", None, None, "heads", None)  # windows go row by row
        query, key, value = jnp.moveaxis(qkv, -3, 0)  # [B, N, T, h, d]
        logits = jnp.einsum("bnqhd,bnkhd->bnhqk", query * (c // heads) ** -0.5, key).astype(
            jnp.promote_types(self.dtype, jnp.float32)
        )
        table = self.param("relative_position_bias_table", _init, ((2 * window - 1) ** 2, heads))
        if own := selected(self):
            tables = own["relative_position_bias_table"]  # [G, rows, h]
            bias = tables[:, relative_position_index(window)].transpose(0, 3, 1, 2)  # [G, h, T, T]
            logits += jnp.repeat(bias, len(logits) // len(bias), axis=0)[:, None]
        else:
            logits += table[relative_position_index(window)].transpose(2, 0, 1)  # [h, T, T]
        if self.shift:
            logits += shifted_window_mask(padded_h, padded_w, window, self.shift)[:, None]
        weights = nn.softmax(logits).astype(self.dtype)
        x = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value).reshape(x.shape)
        x = Dense(c, kernel_init=_init, dtype=self.dtype, name="proj")(x)

        x = merge_windows(x, padded_h, padded_w)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :h, :w]


class SwinBlock(nn.Module):
    """Window attention and an MLP, each on the normalised input and added back to it."""

    num_heads: int
    window: int
    shift: int
    mlp_ratio: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool, traced_drop_path: Array | None = None) -> Array:
        """Returns a map of the shape of x, [B, H, W, C]; `traced_drop_path` stands for `drop_path` in a loop."""
        c = x.shape[-1]
        y = layer_norm("norm1", _EPSILON, self.dtype)(x)
        y = WindowAttention(self.num_heads, self.window, self.shift, self.dtype, name="attention")(y)
        x = x + DropPath(self.drop_path)(y, train, traced_drop_path)
        y = layer_norm("norm2", _EPSILON, self.dtype)(x)
        y = Dense(self.mlp_ratio * c, kernel_init=_init, dtype=self.dtype, name="fc1")(y)
        y = constrain(y, "batch", "height", "width", "hidden")
        y = Dense(c, kernel_init=_init, dtype=self.dtype, name="fc2")(gelu(y))
        return constrain(x + DropPath(self.drop_path)(y, train, traced_drop_path), *MAP)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels; the four neighbours vary fastest (mmdetection's order)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
        x = x.reshape(b, h // 2, w // 2, 4 * c)
        x = layer_norm("norm", _EPSILON, self.dtype)(x)
        return Dense(2 * c, use_bias=False, kernel_init=_init, dtype=self.dtype, name="reduction")(x)


class PatchEmbed(nn.Module):
    """A linear projection of patches of 4 x 4 pixels, and a norm."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # [B, H, W, 3] -> [B, ceil(H / 4), ceil(W / 4), features]
        padding = ((0, 0), (0, -pixels.shape[1] % 4), (0, -pixels.shape[2] % 4), (0, 0))
        x = Conv(
            self.features,
            (4, 4),
            (4, 4),
            "VALID",
            kernel_init=torch_kernel_init,
            # Not 0: the padding's patches would be 0, where the gradient of every norm is 300 times what it should be.
            bias_init=torch_bias_init(4 * 4 * pixels.shape[-1]),
            dtype=self.dtype,
            name="projection",
        )(jnp.pad(pixels, padding))
        x = constrain(constrain(x, *WHOLE_MAP), *MAP)
        return layer_norm("norm", _EPSILON, self.dtype)(x)


class Swin(nn.Module):
    """The backbone: feature maps of strides 8, 16 and 32, or from stride 4 on.

    Attributes:
        config: `config.model.swin`.
        remat: policy of each block by its name (see `Block`); those that are not named have none.
        scan: run the blocks of a stage as a loop over pairs.
        first: the first stage whose features are returned: 1, or 0.
    """

    config: ConfigDict
    dtype: jnp.dtype
    remat: Mapping[str, str] = FrozenDict()
    scan: bool = False
    first: int = 1

    @nn.compact
    def __call__(
        self, pixels: Array, train: bool, masked: Array | None = None, mask_token: Array | None = None
    ) -> tuple[Array, ...]:
        """Args: masked bool[B, H / 4, W / 4] says in place of which patches `mask_token` [C] stands (SimMIM)."""
        config = self.config
        drop_path = np.linspace(0, config.drop_path, sum(config.depths)).tolist()
        x = move_by(self, "patch_embed", SLOTS, pixels)
        x = PatchEmbed(config.embed_dim, self.dtype, name="patch_embed")(x)
        x = move_by(self, "patch_embed", PLACES, x)
        if masked is not None and mask_token is not None:
            x = jnp.where(masked[..., None], mask_token.astype(x.dtype), x)
        features = []
        for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            x = move_by(self, f"stage_{stage}", SLOTS, x)
            rates = [drop_path.pop(0) for _ in range(depth)]
            blocks = []
            for index, rate in enumerate(rates):
                fields = {
                    "num_heads": heads,
                    "window": config.window,
                    "shift": config.window // 2 if index % 2 else 0,
                    "mlp_ratio": config.mlp_ratio,
                    "drop_path": rate,
                    "dtype": self.dtype,
                }
                name = f"stage_{stage}_block_{index}"
                blocks.append(Block(name, SwinBlock, fields, train=2, policy=self.remat.get(name, NONE)))
            x = run_blocks(
                self,
                blocks,
                lambda block, x, rate: block(x, train, rate),
                x,
                scan=self.scan,
                train=train,
                period=2,  # every other block shifts its windows
                rates=rates if any(rates) else None,
            )
            if stage >= self.first:
                feature = layer_norm(f"norm_{stage}", _EPSILON, self.dtype)(x)
                features.append(move_by(self, f"stage_{stage}", PLACES, feature))
            if stage + 1 < len(config.depths):
                x = constrain(PatchMerging(self.dtype, name=f"stage_{stage}_downsample")(x), *MAP)
                x = move_by(self, f"stage_{stage}", PLACES, x)
        return tuple(features)
