"""Stacks of blocks as loops: the numbers of the blocks one by one, with less to compile."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from medglip_jax.model.bert import Bert
from medglip_jax.model.blocks import Block, run_blocks
from medglip_jax.model.detector import GLIP
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.activations import NAMES, activations_on
from medglip_jax.parallel.mesh import batch_sharding, make_mesh
from medglip_jax.parallel.presets import PRESETS
from medglip_jax.parallel.rules import match_rules, path_name, shardings
from medglip_jax.planning.costs import CostModel
from medglip_jax.planning.hlo import parse


@pytest.fixture(scope="module")
def model(tiny_config):
    config = tiny_config.model.copy_and_resolve_references()
    config.swin.depths, config.swin.num_heads = (1, 5), (1, 2)  # a loop of two pairs, and a block that is left
    config.swin.embed_dim, config.swin.drop_path = 4, 0.5
    config.bert.num_layers, config.bert.hidden_size, config.bert.vocab_size = 3, 16, 64
    config.tower.num_blocks = 3
    return config


class Text(nn.Module):
    """The text encoder under its name in the detector, on which sharding rules match."""

    config: object
    scan: bool = False
    policy: str = "none"

    @nn.compact
    def __call__(self, ids, train=False):
        remat = {f"layer_{i}": self.policy for i in range(3)}
        return Bert(self.config, jnp.float32, scan=self.scan, remat=remat, name="language")(ids, ids > 3, train)


def drawn(module, *inputs):
    """Parameters of a module, of numbers that NumPy draws: nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, False))["params"]
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)


def assert_same_gradients(found, expected):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # Some gradients are sums that cancel (a key's bias): what is left of them is rounding.
        scale = max(np.abs(x).max(), 1e-3 * largest)
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * scale, err_msg=path_name(path))


def test_a_loop_over_pairs_of_windows_changes_neither_outputs_nor_gradients(model):
    pixels = np.random.default_rng(1).normal(size=(2, 16, 32, 3)).astype(np.float32)
    params = drawn(Swin(model.swin, jnp.float32), pixels)

    def gradient(scan):
        def loss(params):
            return jnp.mean(Swin(model.swin, jnp.float32, scan=scan).apply({"params": params}, pixels, False)[-1] ** 3)

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    (value, expected), (looped_value, found) = gradient(False), gradient(True)
    np.testing.assert_allclose(looped_value, value, rtol=1e-5)
    assert_same_gradients(found, expected)


def loops_of(jaxpr):
    """Lengths of the loops of a program outside of other loops."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        else:
            found += [n for inner in jaxprs_in_params(equation.params) for n in loops_of(inner)]
    return found


def test_the_detector_runs_three_kinds_of_stacks_as_loops_and_starts_as_without_them(model):
    inputs = np.zeros((1, 32, 32, 3), np.float32), np.ones((1, 8), np.int32), np.ones((1, 8), np.int32)
    programs, starts = [], []
    for scan in (False, True):
        config = model.copy_and_resolve_references()
        config.swin.depths, config.swin.num_heads, config.scan = (1, 1, 5, 1), (1, 1, 1, 1), scan
        detector = GLIP(config)
        start, params = jax.make_jaxpr(detector.init, return_shape=True)(jax.random.key(0), *inputs)
        starts.append(str(start))
        programs.append(loops_of(jax.make_jaxpr(detector.apply)(params, *inputs).jaxpr))
    collected = jax.eval_shape(lambda p: detector.apply(p, *inputs, mutable=["intermediates"])[1], params)
    assert {f"tower_{i}" for i in range(3)} <= set(collected["intermediates"])
    assert programs == [[9] * 3, [2, 3, 3]]  # without: the taps of the deformable convolutions
    address = re.compile(r"0x[0-9a-f]+")
    assert address.sub("", starts[0]) == address.sub("", starts[1])


class Drawing(nn.Module):
    """Writes what it draws, and the rate that it is given, into the next row."""

    @nn.compact
    def __call__(self, rows, number, train, rate):
        shift = self.param("shift", nn.initializers.normal(1.0), ())
        drawn = jax.random.uniform(self.make_rng("dropout")) if train else 0.0
        return rows.at[number].set(jnp.stack([drawn, -1.0 if rate is None else rate, shift])), number + 1


class Stack(nn.Module):
    scan: bool
    policies: tuple = ("none",) * 5

    @nn.compact
    def __call__(self, train):
        names = [f"block_{i}" for i in range(5)]
        blocks = [Block(name, Drawing, {}, 3, policy) for name, policy in zip(names, self.policies, strict=True)]

        def call(block, carry, rate):
            return block(*carry, train, rate)

        rates, start = [0.1, 0.2, 0.3, 0.4, 0.5], (jnp.zeros((5, 3)), jnp.int32(0))
        return run_blocks(self, blocks, call, start, scan=self.scan, train=train, period=2, rates=rates)[0]


def test_blocks_of_a_loop_have_their_own_parameters_rates_and_random_numbers():
    params = Stack(True).init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, False)
    rows = np.asarray(Stack(True).apply(params, True, rngs={"dropout": jax.random.key(1)}))
    assert len(set(rows[:, 0].tolist())) == 5
    np.testing.assert_allclose(rows[:, 1], [0.1, 0.2, 0.3, 0.4, -1])  # the last one is no pair: it knows its own
    np.testing.assert_array_equal(rows[:, 2], [params["params"][f"block_{i}"]["shift"] for i in range(5)])


def test_policies_that_differ_within_a_loop_are_named():
    Stack(True, ("full",) * 4 + ("none",)).init(jax.random.key(0), False)  # the last one is outside
    Stack(False, ("full", "none") * 2 + ("none",)).init(jax.random.key(0), False)
    with pytest.raises(ValueError, match=r"config\.model\.scan.*block_1=none.*block_3=dots"):
        Stack(True, ("none", "none", "none", "dots", "none")).init(jax.random.key(0), False)


@pytest.fixture(scope="module")
def on_mesh(model):
    """A function that compiles the text encoder's loss on eight devices, and its inputs there."""
    mesh, ids = make_mesh({"data": 2, "fsdp": 4}), np.arange(96, dtype=np.int32).reshape(8, 12) % 50
    rules = (("batch", ("data", "fsdp")), *((name, ()) for name in NAMES if name != "batch"))
    params = drawn(Text(model.bert), ids)
    placed = shardings(match_rules(PRESETS["fsdp"], params, mesh), mesh)

    def loss(params, ids, scan, train, policy):
        with activations_on(mesh, rules, PRESETS["fsdp"]):
            rngs = {"dropout": jax.random.key(2)}
            return (Text(model.bert, scan, policy).apply({"params": params}, ids, train, rngs=rngs) ** 3).mean()

    def lower(scan, *, train=False, gradient=True, policy="none"):
        differentiated = jax.value_and_grad(loss) if gradient else loss
        result = (None, placed) if gradient else None
        step = jax.jit(
            differentiated, static_argnums=(2, 3, 4), in_shardings=(placed, batch_sharding(mesh)), out_shardings=result
        )
        return step.lower(params, ids, scan, train, policy)

    inputs = jax.device_put(params, placed), jax.device_put(ids, batch_sharding(mesh))
    return lower, inputs, (params, ids)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_loop_over_sharded_parameters_gathers_one_block_at_a_time(on_mesh, policy):
    """Each block is gathered in both directions; without a loop, what was gathered is kept."""
    lower, inputs, (params, _) = on_mesh
    lowered = [lower(False), lower(True, policy=policy)]
    programs = [x.compile() for x in lowered]
    costs = [CostModel(parse(x.as_text()), 8).total().bytes_by_kind() for x in programs]
    blocks = [params["language"][f"layer_{i}"] for i in range(3)]
    size = sum(x.nbytes for x in jax.tree.leaves(blocks) if x.ndim > 1)
    assert costs[1]["all-gather"] <= costs[0]["all-gather"] + size
    assert costs[1]["all-reduce"] <= 1.05 * costs[0]["all-reduce"]
    assert not re.search(r"f32\[3,\d+,\d+\]\S* all-gather\(", programs[1].as_text())
    assert len(programs[1].as_text()) < len(programs[0].as_text())

    (value, expected), (looped_value, found) = (jax.device_get(program(*inputs)) for program in programs)
    assert float(looped_value) == pytest.approx(float(value), rel=1e-5)
    assert_same_gradients(found, expected)


def test_what_a_loop_draws_does_not_depend_on_the_mesh(on_mesh, model):
    lower, inputs, (params, ids) = on_mesh
    value = lower(True, train=True, gradient=False).compile()(*inputs)

    @jax.jit
    def loss(params, ids):
        rngs = {"dropout": jax.random.key(2)}
        return (Text(model.bert, True).apply({"params": params}, ids, True, rngs=rngs) ** 3).mean()

    assert np.isfinite(value) and float(value) == pytest.approx(float(loss(params, ids)), rel=1e-5)
