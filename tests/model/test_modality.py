"""Parts of a modality: nothing at first, a plain model for each modality, the same numbers as a loop over images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.fpn import FPN
from medglip_jax.model.modality import (
    MODALITY,
    add_modalities,
    merge_modality,
    modality_names,
    modality_table,
    modality_variables,
    own_paths,
    without_modalities,
)
from medglip_jax.model.swin import Swin
from medglip_jax.model.text_offsets import apply_model

NAMES = ("", "ct", "mri")
INDEX = np.array([2, 0, 1, 2, 2])


class Encoder(nn.Module):
    """The image's way to the tower, without the rest."""

    config: object

    @nn.compact
    def __call__(self, pixels, train=False):
        model = self.config
        features = Swin(model.swin, jnp.dtype(model.dtype), scan=model.scan, name="backbone")(pixels, train)
        return FPN(model.fpn, jnp.dtype(model.dtype), name="neck")(features, train)


@pytest.fixture(scope="module")
def small(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    swin = config.model.swin
    swin.depths, swin.num_heads, swin.drop_path = (1, 2), (1, 2), 0.0
    config.model.modality.names = "ct, mri"
    return config


def with_parts(config, **fields):
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        config.model.modality[name] = value
    return config


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(len(INDEX), 30, 34, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(small, pixels):
    return jax.jit(Encoder(small.model).init)(jax.random.key(0), pixels)["params"]


def moved(params, seed=1):
    """Parameters whose modalities have gone their own ways."""
    rng = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(np.float32), params[MODALITY])
    return {**params, MODALITY: own}


def encode(model, params, pixels, index=INDEX):
    variables = {"params": without_modalities(params)}
    variables[MODALITY] = modality_variables(params[MODALITY], model, jnp.asarray(index))
    return Encoder(model).apply(variables, pixels)


CASES = {
    "cheap": {"image_parts": "patch_embed,norms,lora", "lora_rank": 2, "embedding": True},
    "stage, each image": {"image_parts": "stage_1,norms"},
    "encoder, in groups": {"image_parts": "encoder", "group": 3},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_mixed_batch_is_a_loop_over_images_with_the_plain_model_of_each(small, plain, pixels, fields):
    config = with_parts(small, **fields)
    model = config.model
    if model.modality.embedding:  # the text's part, which the encoder of images has nothing of
        plain = {**plain, "language": {"layer_0": {"output_norm": {"bias": jnp.zeros(16)}}}}
    started = add_modalities(plain, model, jax.random.key(1))
    shapes = jax.eval_shape(lambda p: encode(model, p, pixels), started)
    weights = [np.random.default_rng(2).normal(size=x.shape) for x in shapes]

    @jax.jit
    def at_once(params):
        return jax.value_and_grad(lambda p: loss(encode(model, p, pixels)))(params)

    @jax.jit
    def loop(params):
        def total(params):
            merged = [merge_modality(params, model, name) for name in NAMES]
            of_image = jax.tree.map(lambda *leaves: jnp.stack(leaves)[INDEX], *merged)
            one = lambda pair: Encoder(model).apply({"params": pair[0]}, pair[1][None])  # noqa: E731
            levels = jax.lax.map(one, (of_image, pixels))
            return loss([x[:, 0] for x in levels])

        return jax.value_and_grad(total)(params)

    def loss(levels):
        return sum(jnp.sum(x * w) for x, w in zip(levels, weights, strict=True))

    params = moved(started)
    (found, gradients), (expected, wanted) = at_once(params), loop(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    wanted, gradients = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, gradients))
    largest = max(np.abs(x).max() for x in wanted.values())
    for path, x in wanted.items():
        np.testing.assert_allclose(gradients[path], x, rtol=0, atol=2e-5 * max(np.abs(x).max(), largest / 1000), err_msg=path)
    assert all(np.abs(x).max() > 0 for path, x in wanted.items() if path.startswith("modality/backbone"))
