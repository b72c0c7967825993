"""Adapters: nothing at first, a product of low rank later, on NumPy and on JAX arrays."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs.medglip_t import get_config
from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.lora import LORA, make_adapters, merge_adapters
from medglip_jax.parallel.mesh import abstract_mesh
from medglip_jax.parallel.presets import PRESETS, resolve_rules
from medglip_jax.parallel.rules import find_placements
from medglip_jax.training.finetuning import add_parameters

KERNEL = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
PARAMS = {"block": {"query": {"kernel": KERNEL, "bias": KERNEL[0]}, "conv": {"kernel": KERNEL.reshape(2, 2, 16, 48)}}}


def adapted(paths=("block/query/kernel",), seed=0):
    return {**PARAMS, LORA: make_adapters(PARAMS, paths, 4, jax.random.key(seed))}


def test_new_adapters_change_nothing_to_the_bit():
    merged = merge_adapters(adapted(), 16.0)
    assert merged.keys() == PARAMS.keys()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), merged, PARAMS)
    assert merge_adapters(PARAMS, 16.0) is PARAMS


def test_first_factor_is_normal_with_the_variance_of_its_inputs():
    a = np.asarray(adapted()[LORA]["block"]["query"]["a"])
    assert a.shape == (64, 4) and a.std() == pytest.approx(1 / 8, rel=0.15)
    other = make_adapters({"x": {"kernel": KERNEL}, **PARAMS}, ("x/kernel", "block/query/kernel"), 4, jax.random.key(0))
    np.testing.assert_array_equal(other["block"]["query"]["a"], a)  # whichever others there are
    assert (np.asarray(other["x"]["a"]) != a).all()


@pytest.mark.parametrize("on", [np.asarray, jax.numpy.asarray])
def test_merged_kernel_has_the_scaled_product_added(on):
    params = adapted()
    pair = params[LORA]["block"]["query"]
    pair["b"] = np.random.default_rng(1).normal(size=(4, 48)).astype(np.float32)
    merged = merge_adapters(jax.tree.map(on, params), 6.0)
    wanted = KERNEL + 6.0 / 4 * np.asarray(pair["a"], np.float64) @ pair["b"]
    np.testing.assert_allclose(merged["block"]["query"]["kernel"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["block"]["query"]["bias"], KERNEL[0])
    assert {type(x) for x in jax.tree.leaves(merged)} == {type(on(KERNEL))}
    assert merged["block"]["query"]["kernel"].dtype == np.float32


@pytest.mark.parametrize("path", ["block/conv/kernel", "block/query/bias"])
def test_only_dense_kernels_have_adapters(path):
    with pytest.raises(ValueError, match=f"lora_patterns: {path} .* is no kernel of a dense layer"):
        adapted((path,))


@pytest.fixture(scope="module")
def full_size():
    """Shapes of GLIP-T with the adapters of the base recipe."""
    config = get_config()
    config.finetune.lora_rank = 8
    shapes = parameter_shapes(GLIP(config.model), config)
    return jax.eval_shape(lambda params: add_parameters(params, config, jax.random.key(0)), shapes)


def test_base_recipe_adapts_attention_and_fusion(full_size):
    modules = {path.removesuffix("/a") for path in traverse_util.flatten_dict(full_size[LORA], sep="/")}
    adapters = {path for path in modules if not path.endswith("/b")}
    assert len(adapters) == 12 * 2 + (12 + 6) * 4 + 6 * 6  # Swin's blocks; layers of BERT and of the tower; fusion
    for path in ("backbone/stage_3_block_1/attention/proj", "language/layer_11/attention_output", "tower_5/text/value"):
        assert path in adapters
    assert "tower_0/fusion/values_l_proj" in adapters and "language/layer_0/output" not in adapters


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_lie_as_their_kernels(full_size, preset):
    mesh = abstract_mesh({"fsdp": 4, "tensor": 2}, 8)
    config = get_config()
    config.sharding, config.finetune.lora_rank = preset, 8
    found = find_placements(resolve_rules(config), full_size, mesh)
    adapters = [path for path in found if path.startswith(LORA)]
    assert adapters and not any(found[path].lost for path in adapters)
    for path in adapters:
        rows, columns = (*found[path.removeprefix("lora/")[:-1] + "kernel"].spec, None, None)[:2]
        wanted = (rows, None) if path.endswith("/a") else (None, columns)
        assert (*found[path].spec, None, None)[:2] == wanted, path
