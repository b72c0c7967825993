"""Parts of a modality: nothing at first, a plain model for each modality, the same numbers as a loop over images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict

from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.fpn import FPN
from medglip_jax.model.layers import DropPath
from medglip_jax.model.modality import (
    MODALITY,
    add_modalities,
    classify,
    merge_modality,
    modality_names,
    modality_table,
    modality_variables,
    own_paths,
    without_modalities,
)
from medglip_jax.model.routing import move, plan_groups
from medglip_jax.model.swin import Swin
from medglip_jax.model.text_offsets import apply_model

NAMES = ("", "ct", "mri")
INDEX = np.array([2, 0, 1, 2, 2])


class Encoder(nn.Module):
    """The image's way to the tower, without the rest."""

    config: object
    remat: object = FrozenDict()

    @nn.compact
    def __call__(self, pixels, train=False):
        model = self.config
        features = Swin(model.swin, jnp.float32, self.remat, model.scan, name="backbone")(pixels, train)
        return FPN(model.fpn, jnp.float32, name="neck")(features, train)


@pytest.fixture(scope="module")
def small(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.swin.depths, config.model.swin.num_heads = (1, 4), (1, 2)
    config.model.modality.names, config.model.scan = "ct, mri", True
    return config


def with_parts(config, **fields):
    config = config.copy_and_resolve_references()
    for name, value in fields.items():
        config.model.modality[name] = value
    return config


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(len(INDEX), 30, 34, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(small, pixels):
    shapes = jax.eval_shape(Encoder(small.model).init, jax.random.key(0), pixels)["params"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    bias = np.zeros(small.model.bert.hidden_size, np.float32)
    return {**params, "language": {"layer_0": {"output_norm": {"bias": bias}}}}  # which a merged embedding goes to


def moved(params, seed=1):
    """Parameters whose modalities have gone their own ways."""
    rng = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(np.float32), params[MODALITY])
    return {**params, MODALITY: own}


def encode(model, params, pixels, index=INDEX, **options):
    variables = {"params": without_modalities(params)}
    variables[MODALITY] = modality_variables(params[MODALITY], model, jnp.asarray(index))
    return Encoder(model, **options).apply(variables, pixels)


def test_a_mixed_batch_is_a_loop_over_images_with_the_plain_model_of_each(small, plain, pixels):
    model = with_parts(small, image_parts="patch_embed,norms,lora,stage_0", lora_rank=2, embedding=True, group=2).model
    params = moved(add_modalities(plain, model, jax.random.key(1)))
    remat = {f"stage_1_block_{i}": "full" for i in range(4)}
    shapes = jax.eval_shape(lambda p: encode(model, p, pixels), params)
    weights = [np.random.default_rng(2).normal(size=x.shape) for x in shapes]

    def loss(levels):
        return sum(jnp.sum(x * w) for x, w in zip(levels, weights, strict=True))

    def loop(params):
        merged = [merge_modality(params, model, name) for name in NAMES]
        of_image = jax.tree.map(lambda *leaves: jnp.stack(leaves)[INDEX], *merged)
        levels = jax.lax.map(lambda x: Encoder(model).apply({"params": x[0]}, x[1][None]), (of_image, pixels))
        return loss([x[:, 0] for x in levels])

    def at_once(params):
        return loss(encode(model, params, pixels, remat=remat))

    (found, gradients), (expected, wanted) = (jax.jit(jax.value_and_grad(f))(params) for f in (at_once, loop))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    wanted, gradients = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, gradients))
    largest = max(np.abs(x).max() for x in wanted.values())
    for path, x in wanted.items():
        scale = max(np.abs(x).max(), largest / 1000)
        np.testing.assert_allclose(gradients[path], x, rtol=0, atol=2e-5 * scale, err_msg=path)
    assert all(np.abs(x).max() > 0 for path, x in wanted.items() if path.startswith("modality/backbone"))


@pytest.fixture(scope="module")
def whole(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.swin.depths, config.model.swin.num_heads = (1, 1), (1, 2)
    fields = {"names": "ct,mri", "image_parts": "norms,lora", "lora_rank": 2, "embedding": True, "classifier": True}
    return with_parts(config, **fields)


def test_a_detector_starts_as_the_plain_one_and_is_a_plain_one_for_each_modality(whole):
    """Embeddings go through the pyramid, the text encoder and the tower."""
    model, rng = GLIP(whole.model), np.random.default_rng(0)
    off = with_parts(whole, names="", image_parts="", lora_rank=0, embedding=False, classifier=False)
    shapes = parameter_shapes(GLIP(off.model), off)
    assert MODALITY not in shapes
    plain = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)
    inputs = rng.normal(size=(3, 32, 32, 3)).astype(np.float32), np.array([[5, 7, 9]] * 3), np.ones((3, 3), np.int32)
    index = np.array([1, 0, 2])
    detect = jax.jit(lambda params: apply_model(model, params, *inputs, modality=index))
    detect_plainly = jax.jit(lambda params: apply_model(GLIP(off.model), params, *inputs))
    close = {"rtol": 1e-5, "atol": 2e-6}

    started = add_modalities(plain, whole.model, jax.random.key(1))
    assert jax.tree.map(np.shape, started) == jax.tree.map(lambda x: x.shape, parameter_shapes(model, whole))
    found, expected = detect(started), detect_plainly(plain)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, **close)
    params = moved(started)
    found = detect(params)
    for image, name in enumerate(["ct", "", "mri"]):
        merged = detect_plainly(merge_modality(params, whole.model, name))
        for output, x in merged.items():
            np.testing.assert_allclose(found[output][image], x[image], **close)
        change = max(np.abs(x - expected[output])[image].max() for output, x in merged.items())
        assert change > 1e-4 if name else change == 0
    with pytest.raises(ValueError, match="'pet' has no parts of its own in this model: ct, mri has"):
        merge_modality(params, whole.model, "pet")


def test_a_plain_recipe_is_the_same_program_and_draws_the_same_parameters(tiny_config):
    model = GLIP(tiny_config.model)
    pixels, ids = (jax.ShapeDtypeStruct(*x) for x in (((2, 64, 64, 3), "float32"), ((2, 32), "int32")))
    params = parameter_shapes(model, tiny_config)
    programs = [
        jax.jit(f).lower(params, pixels, ids, ids).as_text()
        for f in (lambda p, *x: model.apply({"params": p}, *x), lambda p, *x: apply_model(model, p, *x))
    ]
    assert programs[0].split("\n", 1)[1] == programs[1].split("\n", 1)[1]
    assert add_modalities(params, tiny_config.model, jax.random.key(0)) is params


def test_parts_have_the_paths_that_they_are_named_after(tiny_config):
    paths = traverse_util.flatten_dict(parameter_shapes(GLIP(tiny_config.model), tiny_config), sep="/")
    backbone = {path for path in paths if path.startswith("backbone/")}

    def own(parts):
        return tuple(map(set, own_paths(paths, with_parts(tiny_config, image_parts=parts).model.modality)))

    assert own("encoder") == (backbone, set()) and own("") == (set(), set())
    stages = [own(f"stage_{i}")[0] for i in range(4)]
    assert set().union(*stages, own("patch_embed")[0]) == backbone and sum(map(len, stages)) < len(backbone)
    assert {"backbone/norm_1/scale", "backbone/stage_1_downsample/reduction/kernel"} < stages[1]
    vectors, adapted = own("norms,lora")
    assert vectors == {path for path in backbone if path.endswith(("/scale", "/bias"))}
    assert adapted and all(path.endswith(("attention/qkv/kernel", "attention/proj/kernel")) for path in adapted)
    assert not any("stage_1" in path for path in own("stage_1,lora")[1])  # whose kernels are copied


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": "ct,ct", "embedding": True}, "a name is there twice"),
        ({"names": "ct"}, "have no parts: set image_parts"),
        ({"image_parts": "norms"}, "no names: set names"),
        ({"names": "ct", "image_parts": "norm"}, "'norm' is no part: there are patch_embed, norms"),
        ({"names": "ct", "image_parts": "encoder,norms"}, "encoder has all other parts in it"),
        ({"names": "ct", "image_parts": "lora"}, "lora_rank is 0"),
        ({"names": "ct", "image_parts": "norms", "lora_rank": 4}, "nothing else has one"),
        ({"names": "ct", "image_parts": "encoder", "group": 0}, "group is 0"),
        ({"names": "ct", "image_parts": "encoder", "dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_settings_that_do_not_go_together_are_told(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        modality_names(with_parts(tiny_config, **fields).model.modality)


def test_a_name_that_records_do_not_know_is_told():
    known = ("unknown", "xray", "ct", "mri")
    assert modality_table("mri, xray", known).tolist() == [0, 2, 0, 1]
    assert modality_table("", known).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="'MRT' is no modality of the records: there are xray, ct, mri"):
        modality_table("MRT", known)


def test_the_classifier_sees_the_shared_parts_inside_the_image_and_teaches_them_nothing(small, plain, pixels):
    config = with_parts(small, image_parts="encoder", classifier=True)
    params = moved(add_modalities({"backbone": plain["backbone"]}, config.model, jax.random.key(1)))
    size = np.array([[30, 34], [20, 10], [30, 34], [30, 34], [9, 9]], np.int32)
    score = jax.jit(lambda p, x, size: classify(p, config.model, x, size))
    gradient = jax.jit(jax.grad(lambda p: classify(p, config.model, pixels, size).sum()))(params)
    logits = score(params, pixels, size)
    assert logits.shape == (5, 2) and len(np.unique(logits)) == 10
    assert np.abs(gradient[MODALITY].pop("classifier")["kernel"]).max() > 0
    assert not any(x.any() for x in jax.tree.leaves(gradient))
    other = {**params, MODALITY: {**params[MODALITY], "backbone": started_over(params[MODALITY]["backbone"])}}
    np.testing.assert_array_equal(score(other, pixels, size), logits)
    whole_size = np.full((5, 2), (30, 34), np.int32)
    assert (np.abs(score(params, pixels, whole_size) - logits).max(axis=1) > 1e-6).tolist() == [0, 1, 0, 0, 1]


def started_over(tree):
    return jax.tree.map(lambda x: x + 1, tree)


def test_drop_path_is_drawn_by_image_whatever_its_slot():
    index, key = np.array([1, 0, 2, 1, 1, 0]), {"dropout": jax.random.key(0)}

    @jax.jit
    def drop(x):
        groups = plan_groups(jnp.asarray(index), 3, 2)
        slots = {MODALITY: {"slots": groups.slots, "places": groups.places}}
        found = DropPath(0.5).apply(slots, move(x, groups.slots), True, rngs=key)
        return DropPath(0.5).apply({}, x, True, rngs=key), move(found, groups.places)

    alone, found = drop(np.ones((6, 3), np.float32))
    assert 0 < np.count_nonzero(alone) < alone.size
    np.testing.assert_array_equal(found, alone)
