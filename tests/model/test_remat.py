"""Rematerialisation by block: which rule decides, and that a policy computes again what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from medglip_jax.model.bert import Bert
from medglip_jax.model.detector import GLIP, block_paths
from medglip_jax.model.remat import block_policies
from medglip_jax.planning.suggestion import POLICIES

PATHS = ["backbone/stage_0_block_0", "backbone/stage_1_block_0", "language/layer_0", "tower_0", "tower_10"]


def test_the_first_pattern_that_is_found_decides():
    assert list(block_policies("none", PATHS).values()) == ["none"] * 5
    assert list(block_policies("blocks", PATHS).values()) == ["full"] * 5
    found = block_policies(r"stage_1=none, backbone=dots, tower_\d$=full", PATHS)
    assert list(found) == PATHS and list(found.values()) == ["dots", "none", "none", "full", "none"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("all", r"'all'.*PATTERN=POLICY.*none, full, dots, dots_no_batch"),
        ("", "'' is none of them"),
        ("tower=full,", "'' is none of them"),
        ("=full", "'=full' is none of them"),
        ("tower=everything", "'everything' in 'tower=everything' is no policy: there are none, full, dots"),
        ("backbone=full,tower_3=full", r"'tower_3' is in the path of no block.*tower_0, tower_10"),
        ("(tower=full", r"'\(tower' is no regular expression"),
    ],
)
def test_mistakes_in_a_rule_are_named(rules, message):
    with pytest.raises(ValueError, match=f"config.model.remat.*{message}"):
        block_policies(rules, PATHS)


def test_paths_are_those_of_parameters_and_the_detector_checks_its_rules(tiny_config):
    config = tiny_config.model.copy_and_resolve_references()
    inputs = jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 8), jnp.int32), jnp.ones((1, 8), jnp.int32)
    params = jax.eval_shape(GLIP(config).init, jax.random.key(0), *inputs)["params"]
    top = {f"{part}/{name}" for part in ("backbone", "language") for name in params[part]} | set(params)
    blocks = {name for name in top if "block" in name or "layer_" in name or "tower_" in name}
    assert set(block_paths(config)) == blocks
    config.remat = "tower_9=full"
    with pytest.raises(ValueError, match="'tower_9' is in the path of no block"):
        jax.eval_shape(GLIP(config).init, jax.random.key(0), *inputs)
    for rules in POLICIES:  # of `medglip plan --suggest`
        block_policies(rules, block_paths(config))


def products(jaxpr):
    """How often a program multiplies matrices, in loops as often as they run."""
    count = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        count += equation.primitive.name == "dot_general"
        count += times * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.fixture(scope="module")
def text_loss(tiny_config):
    """Returns a loss of a text encoder of three layers with dropout, and its parameters."""
    config = tiny_config.model.bert.copy_and_resolve_references()
    config.num_layers, config.vocab_size = 3, 64
    ids = np.arange(12, dtype=np.int32).reshape(1, 12)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Bert(config, jnp.float32).init(jax.random.key(0), ids, ids > 3, False))["params"]
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)

    def make(policies, scan=False):
        module = Bert(config, jnp.float32, remat=policies, scan=scan)
        rngs = {"dropout": jax.random.key(1)}
        return lambda params: (module.apply({"params": params}, ids, ids > 3, True, rngs=rngs) ** 3).mean()

    return make, params


@pytest.mark.parametrize("scan", [False, True])
def test_policies_compute_again_what_they_do_not_keep(text_loss, scan):
    make, params = text_loss

    def count(policies):
        return products(jax.make_jaxpr(jax.grad(make(policies, scan)))(params).jaxpr)

    names = [f"layer_{i}" for i in range(3)]
    plain = count({})
    assert plain == 3 * 3 * 8  # six layers and two products of the attention, each with two for its gradient
    assert count(dict.fromkeys(names, "dots")) == plain
    assert count(dict.fromkeys(names, "dots_no_batch")) == plain + 3 * 2
    assert count(dict.fromkeys(names, "full")) == plain + 3 * 8
    if not scan:
        assert count({"layer_1": "full", "layer_2": "dots_no_batch"}) == plain + 8 + 2


def test_no_policy_changes_a_gradient(text_loss):
    make, params = text_loss
    expected = jax.jit(jax.grad(make({})))(params)
    found = jax.jit(jax.grad(make({"layer_0": "dots", "layer_1": "dots_no_batch", "layer_2": "full"})))(params)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * largest), found, expected)
