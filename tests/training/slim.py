"""A stand-in for GLIP whose step compiles in a second: some of its paths, all of its outputs, matrices only."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from data_pipelines.text import build_prompt, load_tokenizer

SHAPES = {
    "backbone/patch_embed/projection/kernel": (3, 8),
    "backbone/stage_0_block_0/attention/qkv/kernel": (8, 8),
    "backbone/stage_1_block_0/norm1/scale": (8,),
    "language/word_embeddings/embedding": (4096, 8),
    "language/layer_0/query/kernel": (8, 8),
    "language/layer_0/query/bias": (8,),
    "tower_0/fusion/v_proj/kernel": (8, 8),
    "head/box/kernel": (8, 4),
    "head/centerness/kernel": (8, 1),
    "head/text_projection/kernel": (8, 8),
}


class Slim:
    """Is called as GLIP is, on a canvas of 64 x 64 pixels; `dropout` is of the image's features."""

    def __init__(self, dropout=0.0):
        self.dropout = dropout

    def init(self, key, *inputs):
        keys = jax.random.split(key, len(SHAPES))
        flat = {path: jax.random.normal(k, shape) * 0.3 for k, (path, shape) in zip(keys, SHAPES.items(), strict=True)}
        return {"params": traverse_util.unflatten_dict(flat, sep="/")}

    def apply(self, variables, pixels, input_ids, attention_mask, train=False, rngs=None, text_offset=None):
        p = traverse_util.flatten_dict(variables["params"], sep="/")
        assert p.keys() == SHAPES.keys(), "the model must not see what is not its own"
        sides = [64 // stride or 1 for stride in (8, 16, 32, 64, 128)]
        rows = [pixels.reshape(-1, s, 64 // s, s, 64 // s, 3).mean(axis=(2, 4)).reshape(-1, s * s, 3) for s in sides]
        image = jnp.concatenate(rows, axis=1) @ p["backbone/patch_embed/projection/kernel"]  # [B, N, 8]
        image = jnp.tanh(image @ p["backbone/stage_0_block_0/attention/qkv/kernel"])
        image = image * p["backbone/stage_1_block_0/norm1/scale"]
        if train and self.dropout:
            kept = jax.random.bernoulli(rngs["dropout"], 1 - self.dropout, image.shape)
            image = jnp.where(kept, image / (1 - self.dropout), 0)
        text = p["language/word_embeddings/embedding"][input_ids] @ p["language/layer_0/query/kernel"]
        text = jnp.tanh(text + p["language/layer_0/query/bias"])  # [B, L, 8]
        if text_offset is not None:
            text = text + text_offset
        image = jnp.tanh(image @ p["tower_0/fusion/v_proj/kernel"])
        text = text @ p["head/text_projection/kernel"]
        return {
            "token_logits": jnp.einsum("bnd,bld->bnl", image, text) - 2,
            "box_deltas": image @ p["head/box/kernel"],
            "centerness": (image @ p["head/centerness/kernel"])[..., 0],
        }


def random_batch(config, seed=0):
    """Noise images with 1 to 3 boxes each, named by three phrases."""
    rng = np.random.default_rng(seed)
    size, most, length = config.data.batch_size, config.data.max_boxes, config.data.max_tokens
    prompt = build_prompt(["left lung", "lung", "nodule"], load_tokenizer(), length)
    corners = rng.uniform(0, 30, (size, most, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 30, corners.shape)], axis=-1)
    box_mask = np.arange(most) < 1 + np.arange(size)[:, None] % 3
    positive_map = np.zeros((size, most, length), np.float32)
    positive_map[:, :3] = prompt.positive_map
    return {
        "image": rng.integers(0, 256, (size, *config.data.canvas, 3), dtype=np.uint8),
        "image_size": np.full((size, 2), config.data.canvas, np.int32),
        "input_ids": np.tile(prompt.input_ids, (size, 1)),
        "attention_mask": np.tile(prompt.attention_mask, (size, 1)),
        "boxes": np.where(box_mask[..., None], boxes, 0).astype(np.float32),
        "box_mask": box_mask,
        "positive_map": positive_map * box_mask[..., None],
    }
