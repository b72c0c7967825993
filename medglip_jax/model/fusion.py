"""Deep fusion of image and text (arXiv 2112.03857, section 3.2): one attention matrix, read in both directions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medglip_jax.model.layers import Dense, layer_norm
from medglip_jax.ops.widening import spread
from medglip_jax.parallel.activations import PIXELS, TEXT, constrain

Array = jax.Array

_LIMIT = 50000.0
_init = nn.initializers.xavier_uniform()


class VLFuse(nn.Module):
    """Bi-directional cross-attention between all pixels of the pyramid and all tokens of the prompt.

    The residual is added to the normalised streams, not to the raw ones, as in GLIP's code. The image reads only
    tokens under the mask; the text reads every pixel, padding included, and padded tokens read too.
    """

    config: ConfigDict
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, visual: Array, text: Array, mask: Array, train: bool) -> tuple[Array, Array]:
        """Fuses one pair of streams.

        Args:
            visual: [B, N, C], the pixels of all levels.
            text: [B, L, D], token features.
            mask: bool[B, L], real tokens.
            train: whether dropout is on.

        Returns:
            The two streams, of the shapes they came in.
        """
        config = self.config
        heads, head_size = config.fusion_heads, config.fusion_dim // config.fusion_heads
        dropout = nn.Dropout(config.fusion_dropout, deterministic=not train)

        def dense(name: str, features: int) -> Dense:
            return Dense(features, kernel_init=_init, dtype=self.dtype, name=name)

        def split(name: str, x: Array) -> Array:
            y = dense(name, config.fusion_dim)(x).reshape(*x.shape[:2], heads, head_size)
            return constrain(y, "batch", "tokens" if x is text else "pixels", "heads", None)

        visual = constrain(layer_norm("layer_norm_v", 1e-5, self.dtype)(visual), *PIXELS)
        text = constrain(layer_norm("layer_norm_l", 1e-5, self.dtype)(text), *TEXT)
        logits = jnp.einsum("bnhd,blhd->bhnl", split("v_proj", visual) * head_size**-0.5, split("l_proj", text))
        logits = jnp.clip(logits.astype(jnp.promote_types(self.dtype, jnp.float32)), -_LIMIT, _LIMIT)

        to_text = logits - logits.max(axis=2, keepdims=True)
        to_text = dropout(nn.softmax(jnp.maximum(to_text, -_LIMIT), axis=2).astype(self.dtype))
        to_visual = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        to_visual = dropout(nn.softmax(to_visual, axis=3).astype(self.dtype))

        visual_update = jnp.einsum("bhnl,blhd->bnhd", to_visual, split("values_l_proj", text))
        text_update = jnp.einsum("bhnl,bnhd->blhd", to_text, split("values_v_proj", visual))
        visual_update = dense("out_v_proj", visual.shape[-1])(visual_update.reshape(*visual.shape[:2], -1))
        text_update = dense("out_l_proj", text.shape[-1])(text_update.reshape(*text.shape[:2], -1))

        scale = nn.initializers.constant(1 / config.num_blocks)
        gamma_v = self.param("gamma_v", scale, (visual.shape[-1],)).astype(self.dtype)
        gamma_l = self.param("gamma_l", scale, (text.shape[-1],)).astype(self.dtype)
        visual = constrain(visual + spread(gamma_v, visual.shape) * visual_update, *PIXELS)
        return visual, constrain(text + spread(gamma_l, text.shape) * text_update, *TEXT)
