"""AdamW's groups against NumPy, and the schedules against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.training.optimizer import make_optimizer, make_schedule
from medglip_jax.training.step import ema_decay


@pytest.fixture
def config():
    config = get_config()
    config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.eps = 1e-2, 0.1, 1e-3
    config.schedule.steps, config.schedule.warmup_steps, config.schedule.warmup_factor = 100, 4, 0.2
    return config


def test_two_steps_are_adamw_with_the_rates_of_each_group(config):
    config.optimizer.clip_norm = 1e6
    shapes = {
        "language": {"layer": {"kernel": (2, 3), "bias": (3,)}, "norm": {"scale": (3,)}},
        "backbone": {"attention": {"relative_position_bias_table": (4,)}, "norm": {"scale": (2,)}},
        "not_language": {"kernel": (2,)},
    }
    multipliers = {
        "language": {"layer": {"kernel": 0.1, "bias": 0.2}, "norm": {"scale": 0.1}},
        "backbone": {"attention": {"relative_position_bias_table": 2.0}, "norm": {"scale": 1.0}},
        "not_language": {"kernel": 1.0},
    }
    decayed = {
        "language": {"layer": {"kernel": 1, "bias": 0}, "norm": {"scale": 1}},
        "backbone": {"attention": {"relative_position_bias_table": 0}, "norm": {"scale": 1}},
        "not_language": {"kernel": 1},
    }
    rng = np.random.default_rng(0)

    def draw():
        return jax.tree.map(lambda size: rng.normal(size=size), shapes, is_leaf=lambda x: isinstance(x, tuple))

    initial, gradients = draw(), [draw(), draw()]
    settings = config.optimizer

    def expected(p, multiplier, decays, *grads):
        first = second = 0.0
        for step, (g, rate) in enumerate(zip(grads, (1e-2 * 0.2, 1e-2 * 0.4), strict=True), 1):
            first = settings.b1 * first + (1 - settings.b1) * g
            second = settings.b2 * second + (1 - settings.b2) * g**2
            direction = first / (1 - settings.b1**step) / (np.sqrt(second / (1 - settings.b2**step)) + settings.eps)
            p = p - rate * multiplier * (direction + decays * settings.weight_decay * p)
        return p

    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.float32, initial)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    wanted = jax.tree.map(expected, initial, multipliers, decayed, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, wanted)


def test_gradients_are_clipped_before_adam(config):
    config.optimizer.clip_norm, config.optimizer.eps, config.optimizer.weight_decay = 1.0, 1.0, 0.0
    optimizer = make_optimizer(config)
    params = {"a": {"kernel": jnp.zeros(2)}}
    updates, _ = optimizer.update({"a": {"kernel": jnp.array([30.0, 40.0])}}, optimizer.init(params), params)
    clipped = np.array([0.6, 0.8])  # of norm 1; with eps 1, Adam's first step is g / (|g| + 1)
    np.testing.assert_allclose(updates["a"]["kernel"], -2e-3 * clipped / (clipped + 1), rtol=1e-5)


def test_step_schedule_warms_up_then_drops_at_its_points(config):
    rate = make_schedule(config)
    steps = [0, 1, 4, 66, 67, 88, 89, 99]
    wanted = [2e-3, 4e-3, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose([rate(step) for step in steps], wanted, rtol=1e-5)


def test_cosine_schedule_falls_to_zero_at_the_end(config):
    config.schedule.kind = "cosine"
    rate = make_schedule(config)
    np.testing.assert_allclose([rate(s) for s in (0, 4, 52, 100)], [2e-3, 1e-2, 5e-3, 0], rtol=1e-5, atol=1e-9)


def test_no_warm_up_starts_at_the_peak(config):
    config.schedule.warmup_steps = 0
    assert float(make_schedule(config)(0)) == pytest.approx(1e-2)


def test_wrong_schedules_are_named(config):
    config.schedule.step_points = (0.5, 50.0)
    with pytest.raises(ValueError, match=r"config\.schedule\.step_points"):
        make_schedule(config)
    config.schedule.step_points = ()
    config.schedule.kind = "linear"
    with pytest.raises(ValueError, match=r"config\.schedule\.kind is 'linear'"):
        make_schedule(config)
    config.schedule.steps = 0
    with pytest.raises(ValueError, match=r"config\.schedule\.steps is 0"):
        make_schedule(config)


def test_ema_decay_warms_up():
    steps = jnp.array([0, 8, 10**6])
    np.testing.assert_allclose(ema_decay(steps, 0.999), [0.1, 0.5, 0.999], rtol=1e-6)
