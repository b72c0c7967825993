"""One step: the same on one device and on a mesh, what it learns, and what it does with a loss that is not finite."""

import json
import types

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.parallel.rules import path_name
from medglip_jax.training.nonfinite import NonFiniteLoss, NonFiniteSteps
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state, create_state
from medglip_jax.training.step import ema_decay, gradient_groups, make_train_step

STEPS = 8


def random_batch(config):
    """Eight noise images with 0 to 3 boxes each, named by three phrases of two tokens."""
    rng = np.random.default_rng(0)
    size, most, length = config.data.batch_size, config.data.max_boxes, config.data.max_tokens
    input_ids = np.zeros((size, length), np.int32)
    input_ids[:, :10] = rng.integers(5, 4000, (size, 10))
    corners = rng.uniform(0, 30, (size, most, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 30, corners.shape)], axis=-1)
    box_mask = np.arange(most) < np.arange(size)[:, None] % 4
    positive_map = np.zeros((size, most, length), np.float32)
    for place in range(3):
        positive_map[:, place, 1 + 3 * place : 3 + 3 * place] = 0.5
    return {
        "image": rng.integers(0, 256, (size, *config.data.canvas, 3), dtype=np.uint8),
        "image_size": np.full((size, 2), config.data.canvas, np.int32),
        "input_ids": input_ids,
        "attention_mask": (np.arange(length) < np.full((size, 1), 10)).astype(np.int32),
        "boxes": np.where(box_mask[..., None], boxes, 0).astype(np.float32),
        "box_mask": box_mask,
        "positive_map": positive_map * box_mask[..., None],
    }


def copied(tree):
    """The numbers of a state on the host, which the step's donation does not touch; of a random key its words."""

    def copy(x):
        return np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return jax.tree.map(copy, tree)


@pytest.fixture(scope="module")
def run(tiny_config):
    """Jitted steps on one device and on a mesh, from the same state; dropout, drop path and DropBlock are on."""
    config = tiny_config.copy_and_resolve_references()
    config.model.swin.depths = (1, 1, 1, 1)  # compiling is what takes the time here
    config.optimizer.learning_rate, config.schedule.warmup_steps = 1e-3, 0
    config.optimizer.eps = 1e-4  # with less, Adam's first step turns rounding errors of tiny gradients into whole steps
    model, optimizer = GLIP(config.model), make_optimizer(config)
    meshes, steps, placed = {}, {}, {}
    for name, sizes in (("alone", (1, 1, 1)), ("mesh", (2, 2, 2))):
        sizes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        mesh = meshes[name] = make_mesh(ConfigDict(sizes), jax.devices()[: int(np.prod([*sizes.values()]))])
        target = abstract_state(model, config, optimizer, jax.random.key(3), mesh)
        placed[name] = jax.tree.map(lambda x: x.sharding, target)
        steps[name] = jax.jit(
            make_train_step(model, config, optimizer, mesh),
            in_shardings=(placed[name], batch_sharding(mesh)),
            out_shardings=(placed[name], None),
            donate_argnums=0,
        )
    initial, _ = create_state(model, config, optimizer, jax.random.key(3), meshes["alone"])
    initial = copied(initial)

    def start(name="alone", state=initial):
        return jax.device_put(state.replace(rng=jax.random.wrap_key_data(state.rng)), placed[name])

    def step(state, batch, name="alone"):
        return steps[name](state, to_global(batch, meshes[name]))

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


def test_a_mesh_takes_the_same_step(run, trained):
    states, metrics = trained
    spread, values = run.step(run.start("mesh"), run.batch, "mesh")
    values = jax.device_get(values)
    assert set(values) == set(metrics[0]) and values["finite"] and values["num_positives"] > 8
    for name, value in values.items():
        np.testing.assert_allclose(value, metrics[0][name], rtol=1e-4, err_msg=name)
    spread = copied(spread)
    moved = np.abs(states[1].params["head"]["box"]["kernel"] - states[0].params["head"]["box"]["kernel"]).max()
    assert moved > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), spread.params, states[1].params)
    # Adam hides the length of the gradient, its first moment does not.
    moments = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (spread, states[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *moments)


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


@pytest.mark.parametrize(
    ("group", "name", "value", "loss_is_finite"), [("box", "bias", np.nan, False), (None, "log_scale", 1000, True)]
)
def test_loss_or_gradient_that_is_not_finite_leaves_the_state_as_it_was(
    run, tmp_path, group, name, value, loss_is_finite
):
    params = jax.tree.map(lambda x: x, run.initial.params)
    leaves = params["head"][group] if group else params["head"]
    leaves[name] = np.full_like(leaves[name], value)
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
