"""The whole detector on meshes of eight CPU devices: the numbers are those of one device.

Two processes are in tests/test_distributed.py, more meshes and steps in benchmarks/mesh_invariance.py.
"""

import jax
import numpy as np
import pytest

from benchmarks.mesh_invariance import deviations, run_steps
from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.detection.losses import detection_losses
from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.parallel.presets import PRESETS
from medglip_jax.parallel.rules import match_rules, path_name, shardings


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.swin.depths = (1, 1, 1, 1)  # compiling is what takes the time here
    return config


@pytest.fixture(scope="module")
def inputs(config):
    """Parameters and a batch of eight noise images with a box each."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(GLIP(config.model), config)
    params = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)
    size, length, most = config.data.batch_size, config.data.max_tokens, config.data.max_boxes
    mask = (np.arange(length) < rng.integers(5, 20, (size, 1))).astype(np.int32)
    positive_map = np.zeros((size, most, length), np.float32)
    positive_map[:, 0, 1:3] = 0.5
    boxes = np.zeros((size, most, 4), np.float32)
    boxes[:, 0] = [8, 4, 40, 50]
    return params, {
        "image": rng.integers(0, 256, (size, *config.data.canvas, 3), dtype=np.uint8),
        "image_size": np.full((size, 2), config.data.canvas, np.int32),
        "input_ids": (rng.integers(5, 4000, (size, length)) * mask).astype(np.int32),
        "attention_mask": mask,
        "boxes": boxes,
        "box_mask": np.arange(most) < np.ones((size, 1)),
        "positive_map": positive_map,
    }


def loss_and_gradients(config, inputs, rules, sizes):
    params, batch = inputs
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
    placed = shardings(match_rules(rules, params, mesh), mesh)

    def loss(params, batch):
        pixels = normalize_pixels(batch["image"], batch["image_size"])
        with activations_on(mesh, config.activation_rules):
            outputs = GLIP(config.model).apply({"params": params}, pixels, batch["input_ids"], batch["attention_mask"])
        return detection_losses(outputs, batch, config.detection)["loss"]

    step = jax.jit(jax.value_and_grad(loss), in_shardings=(placed, batch_sharding(mesh)), out_shardings=(None, placed))
    return jax.device_get(step(jax.device_put(params, placed), to_global(batch, mesh)))


def test_a_preset_changes_no_gradient(config, inputs):
    alone = loss_and_gradients(config, inputs, PRESETS["ddp"], {"data": 1})
    sizes = {"fsdp": 2, "sequence": 2, "tensor": 2}
    loss, gradients = loss_and_gradients(config, inputs, PRESETS["fsdp_tp"], sizes)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(alone[1]))
    for (path, expected), found in zip(
        jax.tree_util.tree_leaves_with_path(alone[1]), jax.tree.leaves(gradients), strict=True
    ):
        # Some gradients are sums that cancel (a key's bias): what is left of them is rounding.
        scale = max(np.abs(expected).max(), 1e-3 * largest)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=path_name(path))


@pytest.fixture(scope="module")
def training(config, tmp_path_factory):
    """A recipe with phantoms, the dropouts of the full-size one, and clipping that does something."""
    folder = tmp_path_factory.mktemp("records") / "phantoms"
    build(Phantoms(13, size=64, seed=3), folder, name="phantoms", progress=False)
    config = config.copy_and_resolve_references()
    config.data.train = str(folder)
    config.data.max_tokens, config.data.max_boxes = 64, 32
    config.schedule.warmup_steps = 2
    config.optimizer.clip_norm = 0.5
    model = config.model
    assert model.swin.drop_path and model.fpn.drop_block and model.bert.dropout and model.tower.fusion_dropout
    return config


def test_training_on_a_mesh_is_training_on_one_device(training):
    expected, parameters = run_steps(training, 6, devices=jax.devices()[:1])
    config = training.copy_and_resolve_references()
    config.sharding = "hsdp"
    config.mesh.replica, config.mesh.data, config.mesh.fsdp = 2, 1, 4
    found, sharded = run_steps(config, 6)
    assert all(metrics["grad_norm"] > 0.5 for metrics in expected)
    assert len({metrics["num_positives"] for metrics in expected}) > 1
    assert {"loss", "loss_token", "loss_box", "loss_centerness", "ema_norm", "parameter_norm"} <= set(expected[0])
    # A norm of gradients adds rounding errors that a loss has not seen.
    largest = deviations(found, expected)
    assert largest.pop("grad_norm") < 1e-5
    assert max(largest.values()) < 1e-5, largest
    moved = max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (sharded, parameters)), strict=True))
    assert moved < 0.05 * config.optimizer.learning_rate
