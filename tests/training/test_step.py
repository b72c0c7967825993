"""One step: what it learns, and what it does with a loss that is not finite."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.parallel.rules import path_name
from medglip_jax.training.nonfinite import NonFiniteLoss, NonFiniteSteps
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import ema_decay, gradient_groups, make_train_step
from tests.training.slim import Slim, random_batch

STEPS = 8


class Detector(Slim):
    """The stand-in, with dropout, and a kernel whose gradient is no number where it is 0."""

    def apply(self, variables, pixels, input_ids, attention_mask, train=False, rngs=None, text_offset=None):
        outputs = super().apply(variables, pixels, input_ids, attention_mask)
        kept = jax.random.bernoulli(rngs["dropout"], 0.9, outputs["token_logits"].shape)
        length = jnp.linalg.norm(variables["params"]["head"]["centerness"]["kernel"])
        return outputs | {
            "token_logits": outputs["token_logits"] * kept,
            "centerness": outputs["centerness"] + length,
        }


def copied(tree):
    """The numbers of a state on the host, which the step's donation does not touch; of a random key its words."""

    def copy(x):
        return np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return jax.tree.map(copy, tree)


@pytest.fixture(scope="module")
def run(tiny_config):
    """The jitted step on one device; its whole on meshes is in tests/parallel/test_same_numbers.py."""
    config = tiny_config.copy_and_resolve_references()
    config.optimizer.learning_rate, config.schedule.warmup_steps = 0.1, 0
    config.optimizer.eps = 1e-4  # with less, Adam's first step turns rounding errors of tiny gradients into whole steps
    model, optimizer = Detector(), make_optimizer(config)
    mesh = make_mesh(ConfigDict({"data": 1}), jax.devices()[:1])
    initial, placed = create_state(model, config, optimizer, jax.random.key(3), mesh)
    jitted = jax.jit(
        make_train_step(model, config, optimizer, mesh),
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, None),
        donate_argnums=0,
    )
    initial = copied(initial)

    def start(state=initial):
        return jax.device_put(state.replace(rng=jax.random.wrap_key_data(state.rng)), placed)

    def step(state, batch):
        return jitted(state, to_global(batch, mesh))

    return types.SimpleNamespace(config=config, batch=random_batch(config), initial=initial, start=start, step=step)


@pytest.fixture(scope="module")
def trained(run):
    """The states and metrics of a few steps on one batch, the initial state first."""
    state = run.start()
    states, metrics = [copied(state)], []
    for _ in range(STEPS):
        state, values = run.step(state, run.batch)
        states.append(copied(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def test_loss_falls_on_one_batch(trained):
    states, metrics = trained
    losses = [float(values["loss"]) for values in metrics]
    assert losses[-1] < 0.9 * losses[0] and losses[-1] == min(losses)
    assert [int(state.step) for state in states] == list(range(STEPS + 1))
    parts = sum(metrics[0][f"loss_{name}"] for name in ("token", "box", "centerness"))
    assert float(metrics[0]["loss"]) == pytest.approx(float(parts), rel=1e-6)


def test_dropout_differs_from_step_to_step(run, trained):
    """Of two states that differ in the number of steps alone, the losses differ."""
    later = run.initial.replace(step=np.int32(1))
    _, values = run.step(run.start(state=later), run.batch)
    assert float(values["loss"]) != float(trained[1][0]["loss"])


def test_average_follows_its_formula(run, trained):
    states, _ = trained
    average = states[0].params
    for step, state in enumerate(states[1:]):
        decay = float(ema_decay(np.int32(step), run.config.optimizer.ema))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, average)


def test_padding_changes_nothing(run, trained):
    rng, batch = np.random.default_rng(1), dict(run.batch)
    boxes, tokens = ~batch["box_mask"], batch["attention_mask"] == 0
    batch["boxes"] = np.where(boxes[..., None], np.float32([1, 2, 40, 50]), batch["boxes"])
    batch["positive_map"] = np.where(boxes[..., None], np.float32(0.1), batch["positive_map"])
    batch["input_ids"] = np.where(tokens, rng.integers(5, 4000, tokens.shape), batch["input_ids"]).astype(np.int32)
    state, values = run.step(run.start(), batch)
    states, metrics = trained
    np.testing.assert_allclose(values["loss"], metrics[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(values["grad_norm"], metrics[0]["grad_norm"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), copied(state.params), states[1].params
    )


def test_real_boxes_and_tokens_do_change_the_loss(run, trained):
    """Holds the test above to account: the same changes outside the padding."""
    for name, change in (("boxes", lambda x: x * 0.5), ("input_ids", lambda x: (x + 7) % 4000)):
        _, values = run.step(run.start(), run.batch | {name: change(run.batch[name])})
        assert abs(float(values["loss"]) - float(trained[1][0]["loss"])) > 1e-4


@pytest.mark.parametrize(("name", "value", "loss_is_finite"), [("box", np.nan, False), ("centerness", 0, True)])
def test_loss_or_gradient_that_is_not_finite_leaves_the_state_as_it_was(run, tmp_path, name, value, loss_is_finite):
    params = jax.tree.map(lambda x: x, run.initial.params)
    kernel = params["head"][name]["kernel"]
    params["head"][name]["kernel"] = np.full_like(kernel, value)
    poisoned = run.start(state=run.initial.replace(params=params))
    before = copied(poisoned)
    state, values = run.step(poisoned, run.batch)
    assert not values["finite"] and np.isfinite(values["loss"]) == loss_is_finite
    after = copied(state)
    assert after.step == before.step + 1
    after = after.replace(step=before.step)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), before, after)
    assert all(jax.tree.leaves(same))

    groups = gradient_groups(params)
    counts = dict(zip(groups, values["nonfinite"].tolist(), strict=True))
    sizes = dict.fromkeys(groups, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sizes["/".join(path_name(path).split("/")[:2])] += leaf.size
    assert all(0 <= counts[name] <= sizes[name] for name in groups)
    assert any(counts.values())

    ids = np.array(["chest-1", "chest-2"])
    with pytest.raises(
        NonFiniteLoss, match=r"after 5 steps.*chest-1, chest-2.*config\.optimizer\.learning_rate"
    ) as caught:
        NonFiniteSteps(tmp_path, 0, groups).check(5, values, ids)
    assert caught.value.step == 5 and caught.value.image_ids == ("chest-1", "chest-2")
    (line,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert line["step"] == 6 and line["image_ids"] == ["chest-1", "chest-2"]
    assert line["nonfinite_gradients"] == {name: count for name, count in counts.items() if count}


def test_finite_loss_is_let_through(trained, tmp_path):
    values = trained[1][0]
    assert not values["nonfinite"].any()
    assert NonFiniteSteps(tmp_path, 0, ["group"] * values["nonfinite"].size).check(0, values, ["chest-1"])
    assert not (tmp_path / "nonfinite.jsonl").exists()
