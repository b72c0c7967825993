"""Models of the stages before grounding, whose encoders have the paths that they have in GLIP.

    Contrastive    backbone, language    an embedding of each image and of each text
    MaskedImage    backbone              the pixels of what was masked
    RegionCaption  backbone, neck, language    an embedding of each region and of each description

So grounding starts from them by `config.init.patterns`. Each is called as GLIP is; what only one of them takes has a
default under which the parameters are the same.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medglip_jax.model.bert import Bert
from medglip_jax.model.detector import GLIP, block_paths
from medglip_jax.model.fpn import FPN
from medglip_jax.model.layers import Dense
from medglip_jax.model.regions import pool_regions
from medglip_jax.model.remat import block_policies
from medglip_jax.model.swin import Swin

Array = jax.Array

STRIDE = 32  # pixels of the backbone's last stage
PATCH = 4  # pixels of its patches
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
_EPSILON = 1e-12
_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def normalize(x: Array) -> Array:
    """Returns vectors [..., D] of length 1; those that are 0 stay so, with a gradient that is finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), _EPSILON))


def valid_cells(image_size: Array, height: int, width: int, stride: int) -> Array:
    """Returns which cells of a map hold some of their image, bool[B, height, width].

    Args:
        image_size: int32[B, 2], (height, width) in pixels of the image in its canvas.
        height, width: of the map.
        stride: pixels of a cell.
    """
    rows = stride * jnp.arange(height) < image_size[:, :1]
    columns = stride * jnp.arange(width) < image_size[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def pool_map(features: Array, image_size: Array | None, stride: int = STRIDE) -> Array:
    """Returns the mean over the cells that hold some of the image: [B, h, w, C] -> float32[B, C].

    Args:
        features: of a canvas.
        image_size: int32[B, 2], see `valid_cells`; None takes all cells.
        stride: pixels of a cell.
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    if image_size is None:
        return features.mean(axis=(1, 2))
    _, height, width, _ = features.shape
    weights = valid_cells(image_size, height, width, stride)[..., None]
    return jnp.sum(features, axis=(1, 2), where=weights) / jnp.maximum(weights.sum(axis=(1, 2)), 1)


class _Encoders(nn.Module):
    """What the models share.

    Attributes:
        config: `config.model` of a recipe.
        pretraining: `config.pretraining`.
    """

    config: ConfigDict
    pretraining: ConfigDict

    @property
    def dtype(self) -> Any:
        if self.config.dtype not in _DTYPES:
            raise ValueError(f"config.model.dtype is {self.config.dtype!r}: expected one of {', '.join(_DTYPES)}")
        return _DTYPES[self.config.dtype]

    def policies(self, encoder: str) -> dict[str, str]:
        """Returns the policy of each block of an encoder by its name; see `block_policies`."""
        policies = block_policies(self.config.remat, block_paths(self.config))
        prefix = f"{encoder}/"
        return {path.removeprefix(prefix): policy for path, policy in policies.items() if path.startswith(prefix)}

    def encode_image(
        self, pixels: Array, train: bool, masked: Array | None = None, mask_token: Array | None = None
    ) -> tuple[Array, ...]:
        """Returns the maps of `Swin`."""
        swin = Swin(self.config.swin, self.dtype, self.policies("backbone"), self.config.scan, name="backbone")
        return swin(pixels.astype(self.dtype), train, masked, mask_token)

    def encode_text(self, input_ids: Array, attention_mask: Array, train: bool) -> Array:
        """Returns the embeddings of texts, float32[T, E] of length 1; one without tokens is no vector (0)."""
        bert = Bert(self.config.bert, self.dtype, self.policies("language"), self.config.scan, name="language")
        mask = attention_mask.astype(bool)
        hidden = bert(input_ids, mask, train)  # [T, L, D]
        hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        match self.pretraining.text_pooling:
            case "mean":
                count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
                pooled = jnp.sum(hidden, axis=1, where=mask[..., None]) / count
            case "first":
                pooled = hidden[:, 0]
            case other:
                raise ValueError(f"config.pretraining.text_pooling is {other!r}: expected mean or first")
        return self.project("text_projection", pooled)

    def project(self, name: str, x: Array) -> Array:
        return normalize(Dense(self.pretraining.embed_dim, kernel_init=_init, dtype=x.dtype, name=name)(x))

    def calibration(self) -> dict[str, Array]:
        """Returns log_scale and logit_bias, from cosines to logits (arXiv 2303.15343, section 3.2)."""
        if self.pretraining.scale <= 0:
            raise ValueError(f"config.pretraining.scale is {self.pretraining.scale}: its logarithm is learned")
        start = {"log_scale": math.log(self.pretraining.scale), "logit_bias": self.pretraining.bias}
        return {name: self.param(name, nn.initializers.constant(value), ()) for name, value in start.items()}


class Contrastive(_Encoders):
    """The two towers of SigLIP (arXiv 2303.15343)."""

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        input_ids: Array,
        attention_mask: Array,
        train: bool = False,
        image_size: Array | None = None,
    ) -> dict[str, Array]:
        """Embeds images and texts, the one without the other.

        Args:
            pixels: float[B, H, W, 3], as `normalize_pixels` returns them.
            input_ids, attention_mask: int32[T, L].
            train: turns on dropout and drop path (random stream "dropout").
            image_size: int32[B, 2], the part of the canvas that is pooled; None is all of it.

        Returns:
            image_embedding float32[B, E] and text_embedding float32[T, E], of length 1; log_scale and logit_bias,
            float32[].
        """
        features = self.encode_image(pixels, train)[-1]
        return {
            "image_embedding": self.project("image_projection", pool_map(features, image_size)),
            "text_embedding": self.encode_text(input_ids, attention_mask, train),
            **self.calibration(),
        }


class MaskedImage(_Encoders):
    """SimMIM (arXiv 2111.09886): a linear layer from the backbone's last stage to the pixels of each cell."""

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        train: bool = False,
        masked: Array | None = None,
    ) -> dict[str, Array]:
        """Paints the whole canvas from what is not masked.

        Args:
            pixels: float[B, H, W, 3], as `normalize_pixels` returns them; H and W are multiples of 32.
            input_ids, attention_mask: not read.
            train: turns on drop path (random stream "dropout").
            masked: bool[B, H / p, W / p] of patches of p = `mask_patch` pixels; None masks nothing.

        Returns:
            painted: float32[B, H, W, 3], in the units of `pixels`.

        Raises:
            ValueError: the canvas cannot be divided into cells of 32 pixels, or the patches into the backbone's.
        """
        b, h, w, _ = pixels.shape
        if h % STRIDE or w % STRIDE:
            raise ValueError(f"config.data.canvas is {h} x {w}: masked_image needs multiples of {STRIDE} pixels")
        token = self.param("mask_token", nn.initializers.truncated_normal(0.02), (self.config.swin.embed_dim,))
        if masked is None:
            masked = jnp.zeros((b, h // PATCH, w // PATCH), bool)
        else:
            masked = repeat_cells(masked, h // PATCH // masked.shape[1])
        features = self.encode_image(pixels, train, masked, token)[-1]  # [B, H / 32, W / 32, C]
        painted = Dense(STRIDE**2 * 3, dtype=self.dtype, name="pixel_decoder")(features)
        painted = painted.reshape(b, h // STRIDE, w // STRIDE, STRIDE, STRIDE, 3).transpose(0, 1, 3, 2, 4, 5)
        return {"painted": painted.reshape(b, h, w, 3).astype(jnp.promote_types(self.dtype, jnp.float32))}


def repeat_cells(x: Array, times: int) -> Array:
    """Enlarges maps [B, h, w] by a whole number."""
    return jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


class RegionCaption(_Encoders):
    """Regions of the pyramid and their descriptions as the towers of SigLIP."""

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        input_ids: Array,
        attention_mask: Array,
        train: bool = False,
        boxes: Array | None = None,
    ) -> dict[str, Array]:
        """Embeds regions and descriptions, the ones without the others.

        Args:
            pixels: float[B, H, W, 3], as `normalize_pixels` returns them.
            input_ids, attention_mask: int32[B, R, L], or [T, L].
            train: turns on dropout, drop path and DropBlock (random stream "dropout").
            boxes: float32[B, R, 4], x0 y0 x1 y1 in pixels of the canvas, half-open; None is the whole canvas.

        Returns:
            image_embedding float32[B R, E], of the regions, and text_embedding float32[B R, E] or [T, E], of length 1;
            log_scale and logit_bias, float32[].
        """
        b, h, w, _ = pixels.shape
        if boxes is None:
            boxes = jnp.broadcast_to(jnp.asarray([0, 0, w, h], jnp.float32), (b, 1, 4))
        levels = FPN(self.config.fpn, self.dtype, name="neck")(self.encode_image(pixels, train), train)
        regions = pool_regions(levels, boxes, self.pretraining.samples).reshape(-1, levels[0].shape[-1])
        texts, masks = (x.reshape(-1, x.shape[-1]) for x in (input_ids, attention_mask))
        return {
            "image_embedding": self.project("region_projection", regions),
            "text_embedding": self.encode_text(texts, masks, train),
            **self.calibration(),
        }


MODELS: dict[str, Any] = {"contrastive": Contrastive, "masked_image": MaskedImage, "region_caption": RegionCaption}


def make_model(config: Any) -> nn.Module:
    """Returns the model of a recipe: GLIP, or that of its stage of pretraining.

    Args:
        config: a recipe; reads `model` and `pretraining`.

    Raises:
        ValueError: there is no such task.
    """
    task = config.pretraining.task
    if not task:
        return GLIP(config.model)
    if task not in MODELS:
        raise ValueError(f"config.pretraining.task is {task!r}: there are {', '.join(MODELS)}, and '' is grounding")
    return MODELS[task](config.model, config.pretraining)
