"""The config file for mmdetection, run without mmdetection: what it says, and how it resizes."""

import sys
import types

import numpy as np
import pytest

from configs import medglip_l, medglip_t
from data_pipelines.transforms import resize_into
from medglip_jax.interop.mmdet_config import config_file

NAMES = {"config_file": "glip_config.py", "weights_file": "model.pth", "language": "bert"}


@pytest.fixture
def run(monkeypatch):
    """Runs a config file beside stand-ins for mmcv and mmdetection, and returns what it defines and registers."""
    transforms, registry = types.ModuleType("mmcv.transforms"), types.ModuleType("mmdet.registry")
    registered = {}
    transforms.BaseTransform = object
    registry.TRANSFORMS = types.SimpleNamespace(
        register_module=lambda module, force: registered.update({module.__name__: module})
    )
    for child in (transforms, registry):
        parent = types.ModuleType(child.__name__.split(".")[0])
        setattr(parent, child.__name__.split(".")[1], child)
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.setitem(sys.modules, child.__name__, child)

    def run(text):
        fields = {}
        exec(compile(text, "glip_config.py", "exec"), fields)
        return fields, registered

    return run


def test_config_has_the_sizes_of_the_model(run):
    fields, _ = run(config_file(medglip_l.get_config(), **NAMES))
    model = fields["model"]
    assert (model["backbone"]["embed_dims"], model["backbone"]["window_size"]) == (192, 12)
    assert model["neck"]["in_channels"] == [384, 768, 1536]
    assert model["bbox_head"]["num_dyhead_blocks"] == 8 and model["bbox_head"]["early_fuse"]
    assert fields["lang_model_name"] == "{{ fileDirname }}/bert"  # mmengine fills it in before it runs the file


@pytest.mark.parametrize("size", [(800, 1344), (1000, 500), (90, 400), (2000, 2100)])
def test_images_are_resized_as_in_training(run, size):
    fields, registered = run(config_file(medglip_t.get_config(), **NAMES))
    step = fields["test_pipeline"][1]
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    results = registered[step["type"]](step["size"], step["pad_val"]).transform({"img": image})
    pixels, inside, scales = resize_into(image, (800, 1344))
    assert results["img_shape"] == inside and results["img"].shape == (800, 1344, 3)
    assert results["scale_factor"] == scales[::-1]
    np.testing.assert_array_equal(results["img"][: inside[0], : inside[1]], pixels[: inside[0], : inside[1]])
    padding = results["img"][inside[0] :]
    assert (padding == np.float32(fields["mean"])).all()  # which the preprocessor turns into 0


def test_sizes_that_mmdetection_cannot_have_are_named():
    config = medglip_t.get_config()
    config.model.fpn.channels, config.model.tower.legacy_offsets = 64, False
    with pytest.raises(ValueError, match=r"model\.fpn\.channels is 64, and 256 there\n.*legacy_offsets is False"):
        config_file(config, **NAMES)
