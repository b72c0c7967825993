"""The mask branch in the detector: what it adds where it is on, and that it leaves no trace where it is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.masks import MaskBranch, without_masks
from medglip_jax.parallel.presets import PRESETS, mask_rules
from medglip_jax.parallel.rules import find_placements


def with_masks(config, kind):
    config = config.copy_and_resolve_references()
    config.model.masks.kind, config.model.masks.channels, config.model.masks.norm_groups = kind, 16, 4
    config.model.masks.num_convs = 1
    return config


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 50, size=(2, 12)).astype(np.int32)
    return rng.normal(size=(2, 40, 64, 3)).astype(np.float32), ids, np.ones((2, 12), np.int32)


def filled(model, config):
    rng = np.random.default_rng(0)

    def fill(path, x):
        if len(x.shape) < 2:
            return np.full(x.shape, path[-1].key.startswith(("scale", "gamma")), np.float32)
        return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, parameter_shapes(model, config))


@pytest.fixture(scope="module")
def both(tiny_config):
    """A detector with both kinds of masks: config, parameters, and a function of the inputs."""
    config = with_masks(tiny_config, "both")
    return config, filled(GLIP(config.model), config), jax.jit(GLIP(config.model).apply)


def test_the_branch_adds_parameters_which_all_presets_place(tiny_config, both):
    _, params, _ = both
    plain, found = flat_shapes(parameter_shapes(GLIP(tiny_config.model), tiny_config)), flat_shapes(params)
    assert not any("mask" in path for path in plain) and plain.items() <= found.items()
    added = found.keys() - plain.keys()
    assert {"/".join(path.split("/")[:2]) for path in added if not path.startswith("masks/")} == {"backbone/norm_0"}
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("replica", "fsdp", "tensor"))
    for name, rules in PRESETS.items():
        placed = find_placements((*rules, *mask_rules(name)), params, mesh)
        assert not any(placed[path].lost for path in added)
        assert {pattern for pattern, _ in mask_rules(name)} <= {
            place.pattern for place in placed.values()
        } or name == "ddp"


@pytest.mark.parametrize("kind", ["phrases", "boxes"])
def test_a_kind_has_no_parameters_of_the_other(tiny_config, kind):
    masks = with_masks(tiny_config, kind).model.masks
    levels = [np.zeros((1, 16 // 2**i, 16 // 2**i, 8), np.float32) for i in range(3)]
    inputs = levels, np.zeros((1, 32, 32, 4), np.float32), np.zeros((1, 6, 16), np.float32)
    shapes = jax.eval_shape(MaskBranch(masks, 0.01, jnp.float32).init, jax.random.key(0), *inputs)["params"]
    assert ("text_projection" in shapes) == ("pixel_projection" in shapes) == (kind == "phrases")
    assert ("controller" in shapes) == ("maps" in shapes) == (kind == "boxes")


def test_off_the_program_is_the_plain_one_and_on_the_boxes_are_its_own(tiny_config, inputs, both):
    config, params, apply = both
    outputs = apply({"params": params}, *inputs)
    plain, recipe = without_masks(params, config)
    assert recipe.model.masks.kind == "" and config.model.masks.kind == "both"
    assert flat_shapes(plain) == flat_shapes(parameter_shapes(GLIP(tiny_config.model), tiny_config))
    programs = [jax.jit(GLIP(c.model).apply).lower({"params": plain}, *inputs) for c in (tiny_config, recipe)]
    assert programs[0].as_text() == programs[1].as_text()
    expected = programs[0].compile()({"params": plain}, *inputs)
    anchors = expected["centerness"].shape[1]
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5)
    assert {name: value.shape for name, value in outputs.items() if name not in expected} == {
        "mask_pixels": (2, 10, 16, 16),
        "mask_tokens": (2, 12, 16),
        "mask_token_bias": (2, 12),
        "mask_maps": (2, 10, 16, 8),
        "mask_parameters": (2, anchors, 169),
    }


def test_masks_read_the_text(inputs, both):
    _, params, apply = both
    pixels, ids, mask = inputs
    first, second = (apply({"params": params}, pixels, x, mask) for x in (ids, ids[:, ::-1].copy()))
    assert np.abs(first["mask_maps"] - second["mask_maps"]).max() > 1e-3


def test_in_bfloat16_masks_are_those_of_float32_but_for_its_rounding(tiny_config):
    masks, rng = with_masks(tiny_config, "both").model.masks, np.random.default_rng(0)
    levels = [rng.normal(size=(2, 16 // 2**i, 16 // 2**i, 8)).astype(np.float32) for i in range(3)]
    inputs = levels, rng.normal(size=(2, 32, 32, 4)).astype(np.float32), rng.normal(size=(2, 6, 16)).astype(np.float32)
    branch = MaskBranch(masks, 0.01, jnp.float32)
    params = branch.init(jax.random.key(0), *inputs)
    expected = branch.apply(params, *inputs)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    found = MaskBranch(masks, 0.01, jnp.bfloat16).apply(params, *cast)
    assert isinstance(expected, dict) and isinstance(found, dict)
    # Large maps are kept small; what a dot product or an anchor's network sums over stays exact.
    assert {name for name, x in found.items() if x.dtype == jnp.bfloat16} == {"mask_pixels", "mask_tokens", "mask_maps"}
    for name, value in expected.items():
        error = np.abs(found[name].astype(jnp.float32) - value)
        assert error.max() < 0.05 * np.abs(value).max(), name


def test_an_unknown_kind_is_an_error(tiny_config):
    config = with_masks(tiny_config, "all")
    with pytest.raises(ValueError, match=r"config\.model\.masks\.kind is 'all'.*'phrases'"):
        parameter_shapes(GLIP(config.model), config)
