"""Losses of pretraining: what counts in them, in parts and on meshes, and mistakes in their recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.pretraining import make_model, repeat_cells
from medglip_jax.parallel.mesh import make_mesh, to_global
from medglip_jax.planning.programs import train_batch
from medglip_jax.training.pretraining import check_pretraining, draw_masks, make_gradients
from tests.training.towers import Towers

SIDE, BATCH = 64, 8
PAINTER = {"token": (3,), "colours": (3, 3)}


class Painter:
    """Paints each pixel from its own colours, or from the token."""

    def apply(self, variables, pixels, input_ids, attention_mask, train, rngs, masked):
        params = variables["params"]
        masked = repeat_cells(masked, SIDE // masked.shape[1])[..., None]
        return {"painted": jnp.where(masked, params["token"], pixels) @ params["colours"]}


@pytest.fixture
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.pretraining.mask_patch = 16
    return config


def with_task(config, task, text, **training):
    config.pretraining.task, config.data.text = task, text
    config.training.update(training)
    return config


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8),
        "image_size": rng.integers(17, SIDE + 1, (BATCH, 2)).astype(np.int32),
        "input_ids": rng.integers(1, 50, (BATCH, 6)).astype(np.int32),
        "attention_mask": np.ones((BATCH, 6), np.int32),
    }


@pytest.fixture
def painter():
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in PAINTER.items()}


@pytest.fixture
def towers():
    return Towers().init(jax.random.key(1))["params"]


def gradients(model, config, batch, params, **sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))]) if sizes else None
    run = jax.jit(make_gradients(model, config, mesh))
    return jax.device_get(run(params, {}, to_global(batch, mesh) if mesh else batch, jax.random.key(3)))


def assert_same(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 20)


@given(st.integers(0, 99), st.floats(0.05, 0.95), st.sampled_from([8, 32]))
def test_a_share_of_each_image_is_masked_and_none_of_its_padding(seed, ratio, patch):
    sizes = np.random.default_rng(seed).integers(1, SIDE + 1, (4, 2))
    found = np.asarray(draw_masks(jax.random.key(seed), jnp.asarray(sizes), (SIDE, SIDE), patch, ratio))
    for masked, (height, width) in zip(found, sizes, strict=True):
        rows, columns = -(-height // patch), -(-width // patch)
        assert not masked[rows:].any() and not masked[:, columns:].any()
        assert abs(masked.sum() - max(ratio * rows * columns, 1)) <= 0.5 + 1e-4 * rows * columns


def test_only_masked_pixels_of_the_image_count(config, batch, painter):
    _, losses = gradients(Painter(), with_task(config, "masked_image", "none"), batch, painter)
    key = jax.random.split(jax.random.key(3))[0]
    masks = np.asarray(draw_masks(key, batch["image_size"], (SIDE, SIDE), 16, config.pretraining.mask_ratio))
    pixels = np.asarray(normalize_pixels(batch["image"], batch["image_size"]))
    painted, wrong = np.asarray(painter["token"] @ painter["colours"]), []
    for image, (height, width), masked in zip(pixels, batch["image_size"], masks, strict=True):
        inside = np.kron(masked, np.ones((16, 16), bool))[:height, :width]
        wrong.append(np.abs(image[:height, :width][inside] - painted).ravel())
    assert losses["loss"] == pytest.approx(np.concatenate(wrong).mean(), rel=1e-5)


def test_masked_images_in_parts_and_on_a_mesh_give_the_numbers_of_the_whole(config, batch, painter):
    config = with_task(config, "masked_image", "none")
    with jax.enable_x64(True):  # thousands of steps up and down are added, which leaves little of float32
        params = jax.tree.map(lambda x: x.astype(jnp.float64), painter)
        wanted = gradients(Painter(), config, batch, params)
        assert_same(gradients(Painter(), config, batch, params, data=2, fsdp=2), wanted, 1e-12)
        config.training.accumulation = 4
        assert_same(gradients(Painter(), config, batch, params), wanted, 1e-12)


def test_pairs_on_a_mesh_give_the_numbers_of_one_device(config, batch, towers):
    config = with_task(config, "contrastive", "captions")
    wanted = gradients(Towers(), config, batch, towers)
    assert wanted[1].keys() == {"loss", "logit_scale", "logit_bias"}
    assert_same(gradients(Towers(), config, batch, towers, data=2, fsdp=4), wanted)


def test_places_without_a_description_do_not_count(config, batch, towers):
    config = with_task(config, "region_caption", "descriptions")
    rng = np.random.default_rng(5)
    rows = batch | {
        "input_ids": rng.integers(1, 50, (BATCH, 2, 6)).astype(np.int32),
        "attention_mask": np.ones((BATCH, 2, 6), np.int32),
        "boxes": rng.uniform(0, SIDE, (BATCH, 2, 4)).astype(np.float32),
        "box_mask": np.tile([True, False], (BATCH, 1)),
    }
    wanted = gradients(Towers(), config, rows, towers)
    other = rows | {"boxes": np.where(rows["box_mask"][..., None], rows["boxes"], 9).astype(np.float32)}
    assert_same(gradients(Towers(), config, other, towers), wanted)
    first = {name: x[:, :1] for name, x in rows.items() if name not in ("image", "image_size")}
    assert_same(gradients(Towers(), config, batch | first, towers, data=4), wanted)


@pytest.mark.parametrize(
    ("task", "text"), [("contrastive", "captions"), ("masked_image", "none"), ("region_caption", "descriptions")]
)
def test_models_take_the_batches_of_their_tasks(config, task, text):
    config = with_task(config, task, text)
    config.data.canvas, config.pretraining.embed_dim = (SIDE, SIDE), 16
    model, tokens = make_model(config), jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), tokens, tokens)["params"]
    run = make_gradients(model, config, make_mesh({"data": 2}, jax.devices()[:2]))
    assert run is not None
    found, losses = jax.eval_shape(run, params, {}, train_batch(config, BATCH, None), jax.random.key(0))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params) and losses["loss"].shape == ()


def test_grounding_has_no_part_in_it(config):
    assert make_gradients(Painter(), config, None) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("task", "text", "fields", "message"),
    [
        ("", "captions", {}, r"config\.data\.text is 'captions', and grounding reads prompts"),
        ("clip", "captions", {}, r"task is 'clip': there are contrastive"),
        ("contrastive", "prompts", {}, r"text is 'prompts': config\.pretraining\.task contrastive needs captions"),
        ("contrastive", "captions", {"training": {"accumulation": 2}}, r"accumulation is 2.*micro-batches do not see"),
        ("region_caption", "descriptions", {"finetune": {"mode": "prompt"}}, r"mode is prompt: there are no prompts"),
        ("contrastive", "captions", {"model": {"masks": {"kind": "boxes"}}}, r"masks\.kind is .boxes.: it is of g"),
        ("masked_image", "none", {"pretraining": {"mask_patch": 24}}, r"mask_patch is 24: it must be a multiple of 4"),
        ("masked_image", "none", {"pretraining": {"mask_ratio": 1.0}}, r"mask_ratio is 1\.0"),
    ],
)
def test_what_does_not_go_together_is_told(config, task, text, fields, message):
    config.pretraining.mask_patch = 32
    for group, values in fields.items():
        config[group].update(values)
    with pytest.raises(ValueError, match=message):
        check_pretraining(with_task(config, task, text))
