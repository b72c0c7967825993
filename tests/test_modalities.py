"""What commands make of a model with parts of modalities: starting, prompts, classification, and export."""

import copy

import jax
import numpy as np
import pytest

from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.text import build_prompt, load_tokenizer, make_prefix
from medglip_jax import export, pretrained
from medglip_jax.evaluation.run import detect_records, make_prompts
from medglip_jax.inference import parameter_shapes
from medglip_jax.interop.folder import write_folder
from medglip_jax.model.detector import GLIP
from medglip_jax.model.modality import MODALITY, add_modalities, merge_modality
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.predict import MedGLIP, _describe_modality
from tests.evaluation.test_run import picture, write_records
from tests.model.test_modality import moved, with_parts

CT, MRI = MODALITIES.index("ct"), MODALITIES.index("mri")


@pytest.fixture(scope="module")
def config(tiny_config):
    fields = {"names": "ct,mri", "image_parts": "norms,lora", "lora_rank": 2, "embedding": True, "classifier": True}
    return with_parts(tiny_config, **fields)


@pytest.fixture(scope="module")
def plain(tiny_config):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(GLIP(tiny_config.model), tiny_config)
    return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params(plain, config):
    return jax.tree.map(np.asarray, moved(add_modalities(plain, config.model, jax.random.key(0))))


def test_a_plain_model_gives_every_modality_its_copies(plain, params, config, tiny_config, monkeypatch):
    config = config.copy_and_resolve_references()
    config.init.model = "somewhere"
    monkeypatch.setattr(pretrained, "load_arrays", lambda path: (plain, tiny_config))
    told = []
    found = pretrained.pretrained_parameters(config, told.append)
    assert {**found, MODALITY: None} == {**plain, MODALITY: None}
    scale = found[MODALITY]["backbone"]["norm_1"]["scale"]
    np.testing.assert_array_equal(scale, np.stack([plain["backbone"]["norm_1"]["scale"]] * 2))
    assert "a" not in found[MODALITY]["backbone"]["stage_0_block_0"].get("attention", {}).get(
        "qkv", {}
    )  # its own start
    assert "of ct, mri start as copies" in told[-1]

    monkeypatch.setattr(pretrained, "load_arrays", lambda path: (params, config))
    again = pretrained.pretrained_parameters(config, told.append)[MODALITY]
    jax.tree.map(np.testing.assert_array_equal, again, params[MODALITY])
    config = with_parts(config, names="ct,mri,pet")
    with pytest.raises(ValueError, match=r"other sizes:\n.*modality/"):
        pretrained.pretrained_parameters(config, told.append)


class Told:
    """Stands in for a detector or a classifier and keeps what it was told."""

    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def __call__(self, params, **inputs):
        self.calls.append({name: np.asarray(x) for name, x in inputs.items()})
        return self.answer(len(inputs["image"]))


def nothing(count):
    return {"boxes": np.zeros((count, 1, 4)), "scores": np.zeros((count, 1)), "phrases": np.full((count, 1), -1)}


@pytest.fixture
def model(params, config):
    model = MedGLIP(GLIP(config.model), params, copy.deepcopy(config), load_tokenizer())
    model._detector = Told(nothing)
    model._classifier = Told(lambda count: np.eye(len(MODALITIES))[[MRI] * count] * 0.75)
    return model


def test_the_classifier_is_asked_where_nobody_says_the_modality(model, tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    found = model.predict([image] * 4, "nodule", modality=["auto", "CT", "auto", "unknown"])
    assert [(x.modality, x.probability) for x in found] == [
        ("mri", 0.75),
        ("ct", None),
        ("mri", 0.75),
        ("unknown", None),
    ]
    assert [len(call["image"]) for call in model._classifier.calls] == [2]
    assert model._detector.calls[0]["modality"].tolist() == [MRI, CT, MRI, 0]
    assert [_describe_modality(x, "ct, mri") for x in found[1:]] == [
        " (ct)",
        " (mri, classified with probability 0.75)",
        " (unknown, with the shared parts of the model)",
    ]
    assert _describe_modality(found[0], "") == ""
    with pytest.raises(ValueError, match=r"modality is 'lung': expected auto or one of unknown, xray"):
        model.predict(image, "nodule", modality="lung")
    with pytest.raises(ValueError, match="1 images but 2 modalities"):
        model.predict([image], "nodule", modality=["ct", "ct"])


def test_a_dicom_file_states_its_modality(model, tmp_path):
    from tests.sources.radiographs import write_radiograph

    path = write_radiograph(tmp_path / "image.bin")
    assert model.predict(str(path), "nodule").modality == "xray" and not model._classifier.calls


def test_prompts_begin_with_the_modality_where_the_recipe_says_so(model):
    image = np.zeros((20, 30, 3), np.uint8)
    model.predict([image] * 2, "nodule", modality=["ct", "unknown"])
    model.config.evaluation.modality_prefix = True
    model.predict([image] * 2, "nodule", modality=["ct", "unknown"])
    before, after = (call["input_ids"] for call in model._detector.calls)
    np.testing.assert_array_equal(after[1], before[1])
    ids = build_prompt(["nodule"], model.tokenizer, after.shape[1], make_prefix("ct")).input_ids
    np.testing.assert_array_equal(after[0], ids[: after.shape[1]])
    assert (after[0] != before[0]).any()
    model.config.evaluation.modality, model._classifier = "ct", None  # as an export of one modality has it
    assert model.predict(image, "nodule").modality == "ct"
    np.testing.assert_array_equal(model._detector.calls[2]["input_ids"][0], after[0])


def test_every_prefix_has_the_same_phrases_in_a_prompt():
    phrases = ["left lung", "right lung", "heart", "nodule", "mass", "rib"]
    tokenizer = load_tokenizer()
    prompts, chunks = make_prompts(phrases, ["", "CT: ", "fundus photograph: "], tokenizer, 16)
    assert len(prompts) > 1 and [k for indices in chunks for k in indices] == list(range(6))
    assert {tuple(x.shape for x in prompt.values()) for prompt in prompts} == {
        tuple(x.shape for x in prompts[0].values())
    }
    assert all(len(x) == 3 for x in prompts[0].values())
    assert (prompts[0]["phrase_valid"] == prompts[0]["phrase_valid"][0]).all()


def test_evaluation_asks_each_image_by_its_own_modality(config, tmp_path):
    kinds = ("ct", "unknown", "mri")
    examples = [GroundingExample(picture(i, (40, 50)), f"{i}", "set", 40, 50, "", kind) for i, kind in enumerate(kinds)]
    write_records(examples, tmp_path, name="three")
    config, tokenizer = config.copy_and_resolve_references(), load_tokenizer()
    config.evaluation.modality_prefix = True
    detector = Told(nothing)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    options = {"tokenizer": tokenizer, "phrases": ["nodule"], "detector": detector}
    detect_records(GLIP(config.model), {}, config, str(tmp_path), mesh, **options)
    (call,) = detector.calls
    assert call["modality"][:3].tolist() == [CT, 0, MRI]
    for row, kind in enumerate(kinds):
        ids = build_prompt(["nodule"], tokenizer, 64, make_prefix(kind)).input_ids
        length = call["input_ids"].shape[1]
        np.testing.assert_array_equal(call["input_ids"][row], ids[:length])
    config.evaluation.modality_prefix = False
    detect_records(GLIP(config.model), {}, config, str(tmp_path), mesh, **options)
    assert len(detector.calls[1]["input_ids"]) == 1


def test_export_is_of_one_modality(params, plain, config, tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "load_arrays", lambda path, use_ema: (params, config))
    with pytest.raises(ValueError, match=r"--modality NAME, of ct,mri, or shared"):
        export.load_plain("run")
    with pytest.raises(ValueError, match="'pet' has no parts of its own"):
        export.load_plain("run", modality="pet")
    for name in ("ct", "shared"):
        found, recipe = export.load_plain("run", modality=name)
        assert recipe.model.to_dict() == tiny_config.model.to_dict() and config.model.modality.names == "ct,mri"
        assert recipe.evaluation.modality == name.removeprefix("shared") and not config.evaluation.modality
        expected = merge_modality(params, config.model, "" if name == "shared" else name)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        write_folder(found, recipe, load_tokenizer(), tmp_path / name, card="")
    with pytest.raises(ValueError, match="medglip export --modality NAME"):
        write_folder(params, config, load_tokenizer(), tmp_path / "both", card="")
    monkeypatch.setattr(export, "load_arrays", lambda path, use_ema: (plain, tiny_config))
    assert export.load_plain("run", modality="shared")[0] is plain
    with pytest.raises(ValueError, match="is a plain model"):
        export.load_plain("run", modality="ct")
