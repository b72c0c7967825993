"""A stand-in for the models of contrastive pretraining whose step compiles in a second: matrices only."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from tests.training.slim import SHAPES as SLIM

SHAPES = {path: shape for path, shape in SLIM.items() if path.startswith(("backbone/", "language/"))} | {
    "image_projection/kernel": (8, 8),
    "log_scale": (),
    "logit_bias": (),
}


class Towers:
    """Is called as `Contrastive` and `RegionCaption` are; a region is known by its corners."""

    def init(self, key, *inputs):
        keys = jax.random.split(key, len(SHAPES))
        flat = {path: jax.random.normal(k, shape) * 0.3 for k, (path, shape) in zip(keys, SHAPES.items(), strict=True)}
        return {"params": traverse_util.unflatten_dict(flat, sep="/")}

    def apply(self, variables, pixels, input_ids, attention_mask, train=False, rngs=None, image_size=None, boxes=None):
        p = traverse_util.flatten_dict(variables["params"], sep="/")
        images = pixels.mean(axis=(1, 2)) if boxes is None else boxes.reshape(-1, 4)[:, :3] / 64
        images = jnp.tanh(images @ p["backbone/patch_embed/projection/kernel"])
        images = jnp.tanh(images @ p["backbone/stage_0_block_0/attention/qkv/kernel"])
        images = images * p["backbone/stage_1_block_0/norm1/scale"] @ p["image_projection/kernel"]
        words = p["language/word_embeddings/embedding"][input_ids.reshape(-1, input_ids.shape[-1])].mean(axis=1)
        texts = jnp.tanh(words @ p["language/layer_0/query/kernel"] + p["language/layer_0/query/bias"])
        names = {"log_scale": p["log_scale"], "logit_bias": p["logit_bias"]}
        return {"image_embedding": images, "text_embedding": texts, **names}
