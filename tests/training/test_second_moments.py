"""Optimizers that keep less: what they keep and where, that they learn, and that moments in bfloat16 move."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medglip_jax.parallel.mesh import abstract_mesh, make_mesh
from medglip_jax.parallel.rules import path_name
from medglip_jax.sharding import describe_sharding
from medglip_jax.training.checkpoint import Checkpoints
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.second_moments import round_stochastically, scale_by_bfloat16_adam
from medglip_jax.training.state import abstract_state

SETTINGS = [("adamw", "float32"), ("adamw", "bfloat16"), ("adafactor", "float32"), ("adafactor", "bfloat16")]
SETTINGS = [*SETTINGS, ("sm3", "float32")]


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.optimizer.learning_rate, config.schedule.warmup_steps, config.optimizer.ema = 3e-2, 0, 0.0
    config.optimizer.factored.min_size = 8
    return config


def with_optimizer(config, kind, dtype="float32", **fields):
    config = config.copy_and_resolve_references()
    config.optimizer.kind, config.optimizer.moment_dtype = kind, dtype
    for name, value in fields.items():
        config.optimizer[name] = value
    return config


def regression(seed=0):
    """A two-layer network that is to be another one; its parameters have one, two and no dimensions."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": {"kernel": (8, 32), "bias": (32,)}, "head": {"kernel": (32, 8), "log_scale": ()}}

    def draw():
        numbers = functools.partial(rng.normal, 0, 0.4)
        return jax.tree.map(lambda size: jnp.float32(numbers(size)), shapes, is_leaf=lambda x: isinstance(x, tuple))

    def network(params, x):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return hidden @ params["head"]["kernel"] * jnp.exp(params["head"]["log_scale"])

    x, teacher = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32), draw()
    wanted = network(teacher, x)
    return draw(), lambda params: jnp.mean((network(params, x) - wanted) ** 2)


@pytest.mark.parametrize(("kind", "dtype"), SETTINGS)
def test_every_kind_learns(config, kind, dtype):
    config = with_optimizer(config, kind, dtype, learning_rate=0.3 if kind == "sm3" else 1e-2)
    params, loss = regression()
    optimizer = make_optimizer(config)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)

    (params, state), losses = train(params)
    assert losses[-1] < 0.2 * losses[0] and losses[-1] < losses[50]
    moments = {x.dtype.name for x in jax.tree.leaves(state) if x.ndim > 1}
    assert dtype in moments or not moments
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_what_each_kind_keeps(config):
    params = {"head": {"kernel": jnp.zeros((16, 3, 64)), "bias": jnp.zeros(64)}, "log_scale": jnp.zeros(())}
    numbers, one = 16 * 3 * 64 + 64 + 1, 4  # bytes of a count

    def kept(kind, dtype="float32", **fields):
        optimizer = make_optimizer(with_optimizer(config, kind, dtype, **fields))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))

    count = 2 * one  # of the moments, and of the schedule
    factored = 4 * (16 * 3 + 3 * 64 + 64 + 1 + 2 * 2 + 1)  # and the places of what is not kept
    assert kept("adamw") == 8 * numbers + count
    assert kept("adamw", "bfloat16") == 4 * numbers + count
    assert kept("adafactor", b1=0.0) == factored + count
    assert kept("adafactor") == factored + 4 * numbers + count + one
    assert kept("adafactor", "bfloat16") == factored + 2 * numbers + count + one
    assert kept("sm3") == 4 * numbers + 4 * (16 + 3 + 64 + 64 + 1) + one


def test_bfloat16_second_moment_follows_that_of_float32():
    """Two thousand steps of noise whose strength doubles in the middle; rounded to nearest, it would stand still."""
    exact, rounded = optax.scale_by_adam(0.9, 0.999, 1e-8), scale_by_bfloat16_adam(0.9, 0.999, 1e-8)
    params = {"a": jnp.zeros(400), "b": jnp.zeros((20, 20))}

    @jax.jit
    def track(key):
        def step(states, inputs):
            key, number = inputs
            noise = jnp.where(number < 1000, 1.0, 2.0) * jax.random.normal(key, 400)
            gradients = {name: noise.reshape(x.shape) for name, x in params.items()}
            updates, exact_state = exact.update(gradients, states[0])
            ours, rounded_state = rounded.update(gradients, states[1])
            return (exact_state, rounded_state), (exact_state.nu, rounded_state.nu, updates, ours)

        keys = jax.random.split(key, 2000), jnp.arange(2000)
        return jax.lax.scan(step, (exact.init(params), rounded.init(params)), keys)[1]

    expected, found, updates, ours = track(jax.random.key(0))
    for name in params:
        assert found[name].dtype == jnp.bfloat16
        ratio = np.asarray(found[name], np.float64) / np.asarray(expected[name], np.float64)
        ratio = ratio.reshape(2000, -1)[[200, 999, 1500, 1999]]
        np.testing.assert_allclose(ratio.mean(axis=1), 1, atol=0.01)  # no bias
        assert ratio.std(axis=1).max() < 0.05
    wandering = np.asarray(ours["a"][1999] - updates["a"][1999])
    assert np.sqrt(np.mean(wandering**2)) < 0.05 * np.sqrt(np.mean(np.asarray(updates["a"][1999]) ** 2))
    # Two parameters with the same gradients are not rounded alike.
    drawn = np.asarray(found["a"], np.float32)[1999] - np.asarray(found["b"], np.float32)[1999].ravel()
    assert np.count_nonzero(drawn) > 300


def test_stochastic_rounding_is_right_on_average():
    x = jnp.asarray([1.0, 1.001, -3.0e-5, 0.0, 7e20], jnp.float32)
    many = jax.vmap(lambda key: round_stochastically(x, key))(jax.random.split(jax.random.key(0), 4000))
    many = np.asarray(many, np.float64)
    np.testing.assert_allclose(many.mean(axis=0), x, rtol=3e-4)
    assert len(np.unique(many[:, 1])) == 2 and len(np.unique(many[:, 0])) == 1


class Small(nn.Module):
    """A model whose parameters the sharding rules split."""

    @nn.compact
    def __call__(self, pixels, input_ids, attention_mask):
        x = nn.Dense(12, name="query")(pixels.mean(axis=(1, 2)).repeat(4, axis=-1))
        return nn.Dense(4, name="output")(x)


def placed_state(config, sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
    return abstract_state(Small(), config, make_optimizer(config), jax.random.key(0), mesh)


SPECS = {
    "adafactor": {
        "v_row/query/kernel": ("fsdp",),  # [12, 12] over (fsdp, tensor), without the last
        "v_col/query/kernel": ("tensor",),
        "v_row/output/kernel": ("fsdp",),  # [12, 4] over (tensor, fsdp), without the longest, which is the first
        "v_col/output/kernel": ("tensor",),
        "v/query/bias": (),
        "v/query/kernel": (),  # one number
        "ema/query/kernel": ("fsdp", "tensor"),
    },
    "sm3": {
        "mu/query/kernel/0": ("fsdp",),
        "mu/query/kernel/1": ("tensor",),
        "mu/output/bias/0": (),
        "nu/query/kernel": ("fsdp", "tensor"),
    },
}


@pytest.mark.parametrize("kind", ["adafactor", "sm3"])
def test_state_lies_with_its_parameter_and_restores_on_another_mesh(config, kind, tmp_path, caplog):
    config = with_optimizer(config, kind)
    config.optimizer.factored.min_size = 4
    target = placed_state(config, {"fsdp": 2, "tensor": 2})
    assert not caplog.records
    leaves = jax.tree_util.tree_leaves_with_path(target.opt_state)
    specs = {path_name(path): x.sharding.spec for path, x in leaves}
    for end, wanted in SPECS[kind].items():
        (name,) = [name for name in specs if name.endswith(f"/{end}")]
        assert tuple(specs[name]) == wanted, end

    rng = np.random.default_rng(0)

    def fill(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), x.sharding)
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    state = jax.tree.map(fill, target)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state)
    other = placed_state(config, {"fsdp": 4})
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored = checkpoints.restore(other)
    for a, b, wanted in zip(*map(jax.tree.leaves, (state.opt_state, restored.opt_state, other.opt_state)), strict=True):
        assert b.sharding == wanted.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_sharding_command_counts_every_kind(config):
    totals = {}
    for kind, dtype in SETTINGS:
        report = describe_sharding(with_optimizer(config, kind, dtype), abstract_mesh({"fsdp": 4, "tensor": 2}, 8))
        totals[kind, dtype] = report["totals"]["optimizer"]
    assert totals["adamw", "bfloat16"]["bytes"] < 0.51 * totals["adamw", "float32"]["bytes"]
    for total in totals.values():
        assert total["bytes_per_device"] < 0.5 * total["bytes"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "adam"}, "kind is 'adam': expected one of adamw, adafactor, sm3"),
        ({"moment_dtype": "float16"}, "moment_dtype is 'float16': expected one of float32, bfloat16"),
        ({"kind": "sm3", "moment_dtype": "bfloat16"}, "sm3 keeps float32"),
    ],
)
def test_mistakes_are_named(config, fields, message):
    config = config.copy_and_resolve_references()
    config.optimizer.update(fields)
    with pytest.raises(ValueError, match=f"config.optimizer.*{message}"):
        make_optimizer(config)
