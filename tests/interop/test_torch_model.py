"""The PyTorch twin in an export folder against the JAX model: names, numbers, detections, and what it refuses."""

import copy
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.reference import ReferenceWeights, load_reference
from configs.medglip_t import get_config
from data_pipelines.prompts import make_prefix
from data_pipelines.text import build_prompts, load_tokenizer
from data_pipelines.transforms import resize_into
from medglip_jax.detection.anchors import decode_boxes, make_anchors
from medglip_jax.detection.postprocess import detect
from medglip_jax.inference import parameter_shapes, stack_prompts
from medglip_jax.interop import mmdet, torch_model
from medglip_jax.interop.folder import processor_files
from medglip_jax.interop.state_dict import to_state_dict
from medglip_jax.model.detector import GLIP
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.ops.deform_conv import Reading, deform_conv_reference
from medglip_jax.predict import MedGLIP, read_image

torch = pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")

pytestmark = pytest.mark.usefixtures("modules_cache")
SOURCES = pathlib.Path(torch_model.__file__).parent
PHRASES = ["left lung", "pleural effusion", "nodule"]
MANY = [*PHRASES, "right lung", "heart", "aortic arch", "trachea", "left clavicle", "rib fracture", "pneumothorax"]
MANY += [f"{name} catheter" for name in ("central venous", "pulmonary artery", "tunnelled dialysis")]


def random_params(config, seed=0):
    """Parameters with nothing at 0 or 1, where a forgotten one would hide."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        name = path[-1].key
        if name == "bias0":
            return np.full(x.shape, -2.0, np.float32)
        if name.endswith("table") or name == "embedding":
            return rng.normal(0, 0.5, x.shape).astype(np.float32)
        if name.endswith("kernel") and path[-2].key == "text_projection":
            return rng.normal(0, 4 * x.shape[0] ** -0.5, x.shape).astype(np.float32)
        if len(x.shape) < 2:
            mean = name.startswith(("scale", "gamma"))
            return rng.normal(mean, 0.2, x.shape).astype(np.float32)
        return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, parameter_shapes(GLIP(config.model), config))


def processor_settings(config):
    return {
        "processor_class": "MedGLIPProcessor",
        "auto_map": {"AutoProcessor": "processing_medglip.MedGLIPProcessor"},
        "canvas": list(config.data.canvas),
        "max_tokens": config.data.max_tokens,
        "detection": config.detection.to_dict(),
    }


def write_folder(folder, config, params):
    """Writes what an export holds."""
    recipe = json.loads(config.to_json())
    settings = {
        "model_type": "medglip",
        "architectures": ["MedGLIPModel"],
        "auto_map": {
            "AutoConfig": "modeling_medglip.MedGLIPConfig",
            "AutoModel": "modeling_medglip.MedGLIPModel",
            "AutoProcessor": "processing_medglip.MedGLIPProcessor",
        },
        "recipe": recipe,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(processor_settings(config)))
    state_dict = dict(to_state_dict(params, mmdet.parameter_names(config.model)))
    save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer().save(folder)
    for name in ("modeling_medglip.py", "processing_medglip.py"):
        shutil.copy(SOURCES / name, folder)
    return folder


@pytest.fixture(scope="module")
def config(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.data.canvas = (96, 136)  # not square, and no multiples of the windows or the coarsest strides
    config.detection.pre_nms, config.detection.score_threshold = 200, 0.1
    return config


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def folder(config, params, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("export"), config, params)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def modeling(model):
    return sys.modules[type(model).__module__]


@pytest.fixture(scope="module")
def pictures():
    """Noise images of four shapes."""
    rng = np.random.default_rng(1)
    sizes = ((90, 150), (201, 100), (41, 30), (96, 136))
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def detector(config, params):
    return MedGLIP(GLIP(config.model), params, config, load_tokenizer())


def jax_outputs(config, params, pixels, prompt):
    """Runs the JAX model on pixels [B, 3, H, W]."""
    run = jax.jit(GLIP(config.model).apply)
    pixels = jnp.asarray(pixels.transpose(0, 2, 3, 1))
    return run({"params": params}, pixels, jnp.asarray(prompt["input_ids"]), jnp.asarray(prompt["attention_mask"]))


def assert_same_outputs(outputs, expected, tolerance):
    for name, x in expected.items():
        x = np.asarray(x)
        np.testing.assert_allclose(
            outputs[name].detach().numpy(), x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name
        )


def test_names_and_shapes_are_those_of_mmdetection(model, config, params):
    expected = dict(to_state_dict(params, mmdet.parameter_names(config.model)))
    state_dict = model.state_dict()
    assert {name: tuple(x.shape) for name, x in state_dict.items()} == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        np.testing.assert_array_equal(state_dict[name].numpy(), x, err_msg=name)


@pytest.mark.parametrize("canvas", [(96, 136), (70, 90)])
@pytest.mark.parametrize("legacy_offsets", [True, False])
def test_dense_outputs_agree_with_jax(config, model, params, canvas, legacy_offsets):
    config = copy.deepcopy(config)
    config.model.tower.legacy_offsets = legacy_offsets
    twin = type(model)(type(model.config)(recipe=json.loads(config.to_json())))
    twin.load_state_dict(model.state_dict())
    rng = np.random.default_rng(2)
    pixels = rng.normal(size=(2, 3, *canvas)).astype(np.float32)
    pixels[1, :, :, 64:] = 0
    prompt = {"input_ids": rng.integers(0, 800, (2, 24)), "attention_mask": np.ones((2, 24), np.int64)}
    prompt["attention_mask"][0, 9:] = 0
    expected = jax_outputs(config, params, pixels, prompt)
    with torch.no_grad():
        outputs = twin(torch.from_numpy(pixels), **{name: torch.from_numpy(x) for name, x in prompt.items()})
    assert_same_outputs(outputs, expected, 1e-5)
    assert outputs.phrase_scores is None


def test_inputs_are_those_of_jax(config, processor, pictures):
    inputs = processor(images=pictures, phrases=PHRASES)
    (prompt, _), *others = build_prompts(PHRASES, load_tokenizer(), config.data.max_tokens)
    assert not others
    expected = stack_prompts([prompt], config.data.max_tokens)
    for i, picture in enumerate(pictures):
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(inputs[name][i].numpy(), expected[name][0])
        np.testing.assert_array_equal(inputs["phrase_map"][i].numpy(), expected["phrase_map"][0, : len(PHRASES)] > 0)
        image, size, _ = resize_into(picture, config.data.canvas)
        pixels = normalize_pixels(jnp.asarray(image[None]), jnp.asarray([size]))
        np.testing.assert_allclose(inputs["pixel_values"][i].permute(1, 2, 0).numpy(), pixels[0], rtol=0, atol=1e-6)
    assert inputs["pixel_values"].dtype == torch.float32 and inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("text", ["Grad-CAM über Ωmega", "肺 nodule", "T2 ﬂair\u200b", "É" * 5, "a/b (c)"])
def test_tokens_are_those_of_jax(processor, text):
    encoding = load_tokenizer().encode(text)
    found = processor.tokenizer(text, return_offsets_mapping=True)
    assert found["input_ids"] == encoding.ids and found["offset_mapping"] == encoding.offsets


def assert_same_detections(result, expected):
    assert len(expected) > 3 and result["phrases"] == expected.phrases
    np.testing.assert_allclose(result["scores"].numpy(), expected.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result["boxes"].numpy(), expected.boxes, rtol=0, atol=0.05)


def test_detections_agree_with_jax(model, processor, detector, pictures):
    expected = detector.predict(pictures, PHRASES, threshold=0.1)
    inputs = processor(images=pictures, phrases=PHRASES, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    arrays = {name: x.numpy() for name, x in outputs.items()}
    for given in (outputs, arrays):
        for result, theirs in zip(processor.post_process(given, inputs, threshold=0.1), expected, strict=True):
            assert_same_detections(result, theirs)


def test_more_phrases_than_a_prompt_holds_are_found_by_predict(config, model, processor, detector, pictures):
    asked = [MANY, PHRASES[:1], MANY[::-1], "heart. Trachea."]
    prompts = processor.split_into_prompts(MANY)
    theirs = build_prompts(MANY, load_tokenizer(), config.data.max_tokens)
    assert prompts == [list(prompt.phrases) for prompt, _ in theirs] and len(prompts) > 1
    expected = detector.predict(pictures, asked, threshold=0.1, max_detections=20)
    found = model.predict(pictures, asked, processor, threshold=0.1, max_detections=20, batch_size=3)
    for result, other in zip(found, expected, strict=True):
        assert_same_detections(result, other)
    single = model.predict(pictures[0], asked[0], processor, threshold=0.1, max_detections=20)
    assert_same_detections(single, expected[0])


def test_a_prefix_is_in_every_prompt_and_in_no_phrase(config, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "ct")
    config = copy.deepcopy(config)
    config.evaluation.modality_prefix, config.evaluation.modality = True, "ct"
    for name, settings in processor_files(config).items():
        (tmp_path / "ct" / name).write_text(json.dumps(settings))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ct", trust_remote_code=True)
    theirs = build_prompts(MANY, load_tokenizer(), config.data.max_tokens, make_prefix("ct"))
    assert processor.split_into_prompts(MANY) == [list(prompt.phrases) for prompt, _ in theirs]
    for prompt, _ in theirs:
        expected = stack_prompts([prompt], config.data.max_tokens)
        inputs = processor(images=np.zeros((8, 8, 3), np.uint8), phrases=list(prompt.phrases))
        np.testing.assert_array_equal(inputs["input_ids"], expected["input_ids"])
        count = len(prompt.phrases)
        np.testing.assert_array_equal(inputs["phrase_map"][0], expected["phrase_map"][0, :count] > 0)
    assert processor.prefix == "CT: " and len(theirs) > 1


def test_every_kind_of_image_is_read_as_in_jax(processor, pictures, tmp_path):
    rng = np.random.default_rng(3)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = Image.fromarray(np.concatenate([pictures[0], pictures[0][..., :1]], axis=-1))
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures[0]).save(tmp_path / "a.jpg", exif=turned)
    Image.fromarray(rng.integers(0, 4000, (50, 60), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(pictures[0][..., 0]).save(tmp_path / "grey.tif")
    alpha.save(tmp_path / "alpha.png")
    files = sorted(tmp_path.iterdir())
    grey = pictures[0][..., 0]
    for image in [*files, str(files[0]), files[1].read_bytes(), alpha, Image.open(files[0]), grey, pictures[0]]:
        np.testing.assert_array_equal(processor.read_image(image), read_image(image))


def test_deformable_convolutions_agree_with_their_definition(modeling):
    rng = np.random.default_rng(4)
    levels = [rng.normal(size=(2, 6, *size)) for size in ((9, 12), (5, 6))]
    kernels = [rng.normal(size=(4, 6, 3, 3)) for _ in range(2)]
    shapes = [[(0, 1, (9, 12)), (1, 1, (5, 6))], [(0, 2, (5, 6))]]
    groups = [
        [
            (level, 4 * rng.normal(size=(2, 18, *size)), rng.uniform(size=(2, 9, *size)), stride)
            for level, stride, size in group
        ]
        for group in shapes
    ]
    groups[0][0][1][0, :, 0, 0] = 1e6  # far outside
    groups[0][0][1][1, :, 8, 11] = -1.5  # at the edge
    readings = [[modeling.Reading(i, torch.tensor(o), torch.tensor(m), s) for i, o, m, s in group] for group in groups]
    found = modeling.deform_convs([torch.tensor(x) for x in levels], [torch.tensor(k) for k in kernels], readings)
    with jax.enable_x64(True):
        for group, kernel, results in zip(groups, kernels, found, strict=True):
            for (level, offsets, mask, stride), result in zip(group, results, strict=True):
                offsets, mask, x = (jnp.asarray(a.transpose(0, 2, 3, 1)) for a in (offsets, mask, levels[level]))
                reading = Reading(level, offsets, mask, stride)
                expected = deform_conv_reference(x, reading, jnp.asarray(kernel.transpose(2, 3, 1, 0)))
                np.testing.assert_allclose(result.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-12)


def test_gradient_of_deformable_convolutions_is_that_of_differences(modeling):
    rng = np.random.default_rng(5)
    x, mask = torch.tensor(rng.normal(size=(1, 2, 4, 5))), torch.tensor(rng.uniform(size=(1, 9, 2, 3)))
    offsets = torch.tensor(rng.uniform(0.1, 0.9, size=(1, 18, 2, 3)) + rng.integers(-3, 3, (1, 18, 2, 3)))
    kernel = torch.tensor(rng.normal(size=(2, 2, 3, 3)))

    def convolve(x, offsets, mask, kernel):
        return modeling.deform_convs([x], [kernel], [[modeling.Reading(0, offsets, mask, 2)]])[0][0]

    inputs = [tensor.requires_grad_() for tensor in (x, offsets, mask, kernel)]
    assert torch.autograd.gradcheck(convolve, inputs)


def test_gradient_reaches_every_parameter(model, processor, pictures):
    inputs = processor(images=pictures[0], phrases=PHRASES)
    twin = copy.deepcopy(model).train()
    outputs = twin(**inputs)
    (outputs.phrase_scores.mean() + outputs.boxes.mean() + outputs.centerness.mean()).backward()
    without = {name for name, x in twin.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0}
    # A softmax does not see a constant added to all keys.
    assert not {name for name in without if not name.endswith("self.key.bias")}


def test_half_precision_keeps_the_boxes(model, processor, pictures):
    inputs = processor(images=pictures[0], phrases=PHRASES)
    with torch.no_grad():
        expected, outputs = model(**inputs), copy.deepcopy(model).to(torch.bfloat16)(**inputs)
    assert {outputs[name].dtype for name in outputs} == {torch.float32}
    assert (outputs.boxes - expected.boxes).abs().mean() < 1
    assert (outputs.phrase_scores - expected.phrase_scores).abs().mean() < 0.02


def test_equal_scores_are_resolved_as_in_jax(processor, config):
    rng = np.random.default_rng(6)
    count = sum(-(-96 // s) * -(-136 // s) for s in config.detection.strides)
    logits = torch.tensor(rng.integers(-3, 3, (1, count, 4)), dtype=torch.float32)
    deltas = torch.tensor(rng.integers(-5, 5, (1, count, 4)), dtype=torch.float32)
    centerness = torch.tensor(rng.integers(-1, 2, (1, count)), dtype=torch.float32)
    phrase_map = jnp.eye(4)
    outputs = {"token_logits": logits.numpy(), "box_deltas": deltas.numpy(), "centerness": centerness.numpy()}
    anchors, _ = make_anchors(96, 136, config.detection.strides, config.detection.anchor_scale)
    boxes = np.array(decode_boxes(jnp.asarray(anchors), jnp.asarray(deltas.numpy())))
    inputs = processor(np.zeros((96, 136, 3), np.uint8), ["a", "b", "c", "d"])
    size, valid = jnp.asarray([[96, 136]]), jnp.ones(4, bool)
    expected = detect(outputs, size, phrase_map, valid, config.detection, canvas=(96, 136))
    outputs = {"boxes": boxes, "phrase_scores": logits.sigmoid(), "centerness": centerness}
    (found,) = processor.post_process(outputs, inputs, threshold=0.0)
    assert len(found["scores"]) == config.detection.max_detections > len(found["scores"].unique())
    assert found["phrases"] == ["abcd"[i] for i in expected["phrases"][0]]
    np.testing.assert_allclose(found["boxes"], expected["boxes"][0], rtol=0, atol=1e-3)


def test_one_graph_serves_any_number_of_phrases(model, processor, pictures):
    inputs = processor(images=pictures[0], phrases=PHRASES)
    exported = torch.export.export(
        model,
        (),
        dict(inputs),
        dynamic_shapes={**dict.fromkeys(inputs), "phrase_map": {1: torch.export.Dim("phrases", min=1, max=512)}},
    )
    other = processor(images=pictures[1], phrases=PHRASES[:2])
    with torch.no_grad():
        assert_same_outputs(exported.module()(**other), {k: v.numpy() for k, v in model(**other).items()}, 1e-6)


def test_saved_again_it_is_the_same(model, processor, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)(pictures, PHRASES)
    before = pickle.loads(pickle.dumps(processor(pictures, PHRASES)))
    with torch.no_grad():
        a, b = (m(**x) for m, x in ((again, inputs), (model, before)))
    assert torch.equal(a.phrase_scores, b.phrase_scores)
    found, expected = processor.post_process(a, inputs), processor.post_process(b, before)
    assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(found, expected, strict=True))


def encode(kind):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("images", "phrases", "message"),
    [
        (np.zeros((9, 9, 3), np.uint8), [], "at least one"),
        (np.zeros((9, 9, 3), np.uint8), ["heart", " "], "none empty"),
        (np.zeros((9, 9, 3), np.uint8), [["heart", 3]], "expected text"),
        (np.zeros((9, 9, 3), np.uint8), ["\ud800"], "Unicode"),
        (np.zeros((9, 9, 3), np.uint8), ["heart", "\x00"], "keeps nothing"),
        (np.zeros((9, 9, 3), np.uint8), ["lung " * 40], "'lung lung .* needs .* shorter"),
        (np.zeros((9, 9, 3), np.uint8), MANY, "13 phrases needs .* model.predict"),
        (np.zeros((9, 9, 3), np.uint8), [["heart"], ["lung"]], "1 images but 2 lists"),
        (np.zeros((9, 9, 3)), ["heart"], "must be uint8"),
        ([], ["heart"], "no images"),
        ("missing.png", ["heart"], "no such image"),
        (encode("PNG")[:9000], ["heart"], "bytes cannot be decoded"),
        (encode("JPEG")[:-200], ["heart"], "bytes cannot be decoded"),
        (b"", ["heart"], "bytes cannot be decoded"),
        (Image.new("I;16", (9, 9)), ["heart"], "8 bits"),
    ],
)
def test_what_cannot_be_asked_is_told(processor, images, phrases, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, phrases=phrases)


def test_options_out_of_range_are_told(model, processor, pictures):
    for options, message in (
        ({"threshold": 2}, "threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(pictures[0], PHRASES, processor, **options)
    with pytest.raises(ValueError, match="shorter"):
        model.predict(pictures[0], ["heart", "lung " * 40], processor)
    inputs = processor(pictures[0], PHRASES)
    outputs = model(**inputs)
    with pytest.raises(ValueError, match="what the processor returned"):
        processor.post_process(outputs, dict(inputs))
    with pytest.raises(ValueError, match="phrase_scores"):
        processor.post_process(model(inputs.pixel_values, inputs.input_ids, inputs.attention_mask), inputs)
    with pytest.raises(ValueError, match="anchors"):
        processor.post_process({**outputs, "phrase_scores": outputs.phrase_scores[:, 1:]}, inputs)
    with pytest.raises(ValueError, match="phrase_map is for 31"):
        model(**{**inputs, "phrase_map": inputs.phrase_map[..., 1:]})
    with pytest.raises(ValueError, match="no recipe"):
        type(model)(type(model.config)())
    with pytest.raises(ValueError, match="64 positions"):
        model(inputs.pixel_values, *torch.ones(2, 1, 65, dtype=torch.int64))


def test_folder_needs_no_jax_and_none_of_this_repository(folder, pictures, tmp_path):
    np.save(tmp_path / "image.npy", pictures[0])
    script = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("jax", "jaxlib", "flax", "medglip_jax", "data_pipelines", "configs"):
                    raise AssertionError("imported " + name)

        sys.meta_path.insert(0, Blocker())
        import numpy as np
        import torch
        from transformers import AutoModel, AutoProcessor

        processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
        model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
        inputs = processor(images=[np.load("image.npy")], phrases={PHRASES!r}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model(**inputs)
        (result,) = processor.post_process(outputs, inputs, threshold=0.1)
        assert len(result["boxes"]) == len(result["scores"]) == len(result["phrases"]) > 3
        print("found")
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "found", done.stderr


def test_full_size_model_agrees_with_mmdetection(shared_dir, modeling):
    reference = load_reference(shared_dir / "reference" / "glip_t_2blocks")
    config = get_config()
    config.model.tower.num_blocks = 2
    with torch.device("meta"):
        model = modeling.MedGLIPModel(modeling.MedGLIPConfig(recipe=json.loads(config.to_json())))
    weights = ReferenceWeights(reference.shapes, dtype=np.float32)
    state_dict = {name: torch.from_numpy(np.asarray(weights[name])) for name in model.state_dict()}
    model.load_state_dict(state_dict, assign=True)
    vectors = reference.vectors
    inputs = [torch.from_numpy(np.asarray(vectors[name])) for name in ("image", "input_ids", "attention_mask")]
    with torch.no_grad():
        outputs = model.eval()(inputs[0].float(), inputs[1].long(), inputs[2])
    start = 0
    for i in range(5):
        count = vectors[f"cls_{i}"].shape[1]
        for name, key in (("cls", "token_logits"), ("box", "box_deltas"), ("ctr", "centerness")):
            expected = vectors[f"{name}_{i}"]
            found = outputs[key][:, start : start + count].numpy()
            if name == "cls":
                found = found[..., : expected.shape[-1]]
            else:
                expected = expected.reshape(*expected.shape[:2], -1).swapaxes(1, 2).reshape(found.shape)
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=f"{name}_{i}"
            )
        start += count
