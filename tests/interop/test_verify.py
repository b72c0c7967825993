"""`medglip export --verify`, and how detections of two models are paired."""

import sys

import jax
import numpy as np
import pytest

from data_pipelines.text import load_tokenizer
from medglip_jax import export
from medglip_jax.interop import glip
from medglip_jax.interop.folder import write_folder
from medglip_jax.interop.onnx import OnnxModel
from medglip_jax.interop.verify import Agreement, match_detections

BOXES = np.float32([[0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 10, 10]])
SCORES = np.float32([0.9, 0.5, 0.4])
NAMES = ["lung", "heart", "heart"]


def test_order_of_equal_scores_does_not_count():
    order = [0, 2, 1]
    others = (BOXES[order] + 0.01, SCORES[order], [NAMES[i] for i in order])
    unmatched, box_error, score_error = match_detections(BOXES, SCORES, NAMES, others)
    assert unmatched == 0 and score_error == 0
    assert box_error == pytest.approx(0.01, abs=1e-5)


def test_detections_of_one_model_alone_are_counted_from_both_sides():
    others = (BOXES[:2], SCORES[:2], NAMES[:2])
    assert match_detections(BOXES, SCORES, NAMES, others)[0] == 1
    assert match_detections(*others, (BOXES, SCORES, NAMES))[0] == 1
    assert match_detections(BOXES, SCORES, NAMES, (BOXES, SCORES, ["lung", "lung", "heart"]))[0] == 2
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [])
    assert match_detections(*empty, empty) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    "change, holds",
    [
        ({}, True),
        ({"unmatched": 1}, False),
        ({"box_error": 0.06}, False),
        ({"score_error": 2e-4}, False),
        ({"box_error": float("nan")}, False),
        ({"detections": 0}, False),
    ],
)
def test_agreement_has_bounds(change, holds):
    figures = {"images": 2, "detections": 9, "unmatched": 0, "box_error": 0.01, "score_error": 1e-5, "source": ""}
    assert Agreement(**(figures | change)).holds == holds


@pytest.fixture
def checkpoint(tiny_params, tiny_config, tmp_path):
    """An exported folder, which is a checkpoint too."""
    write_folder(tiny_params, tiny_config, load_tokenizer(), tmp_path / "model", card="")
    return tmp_path / "model"


@pytest.mark.usefixtures("modules_cache")
class TestCommand:
    def test_figures_go_into_the_card(self, checkpoint, tmp_path, capsys):
        pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs the packages of the extra `onnx`")
        output = tmp_path / "out"
        assert export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--onnx", "--verify"]) == 0
        printed = capsys.readouterr().out
        for kind in ("PyTorch", "ONNX"):
            assert f"detections in 8 images (phantoms, one a modality, {kind}): boxes to" in printed
        card = (output / "README.md").read_text()
        assert "It finds what the JAX model finds" in card and "0 without a partner" in card and "torch 2" in card

    def test_a_model_that_finds_something_else_fails(self, checkpoint, tmp_path, monkeypatch, capsys):
        pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")
        output = tmp_path / "out"
        load = export.load_twin

        def load_another(folder):
            twin, processor = load(folder)
            twin.bbox_head.head.bbox_pred.bias.data += 0.1
            return twin, processor

        monkeypatch.setattr(export, "load_twin", load_another)
        assert export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--verify"]) == 1
        assert "does NOT find" in (output / "README.md").read_text()

    def test_images_need_phrases(self, checkpoint, tmp_path, capsys):
        arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--verify", "a.png"]
        assert export.main(arguments) == 1
        assert "needs --phrases" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--verify"], ["--onnx"], ["--format", "mmdet"], ["--format", "glip"]])
def test_missing_pytorch_is_told_before_anything_is_written(option, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *option]
    assert export.main(arguments) == 1
    assert "pip install 'medglip_jax[torch]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_without_an_onnx_file_is_told(checkpoint):
    pytest.importorskip("onnxruntime", reason="needs the packages of the extra `onnx`")
    with pytest.raises(ValueError, match=r"no model\.onnx: write it with medglip export --onnx"):
        OnnxModel(checkpoint)


def test_real_images_of_many_modalities_give_the_same_detections(
    shared_dir, tiny_params, tiny_config, tmp_path, modules_cache
):
    """A model with random parameters finds many boxes of little sense: it is the agreement that counts."""
    pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")
    images = sorted((shared_dir / "data" / "biomedparse_demo" / "images").iterdir())[::3]
    images.append(next(iter(sorted((shared_dir / "data" / "bccd" / "JPEGImages").iterdir()))))
    images.append(next(iter(sorted((shared_dir / "data" / "sa_med2d_demo").rglob("images/*.png")))))
    write_folder(tiny_params, tiny_config, load_tokenizer(), tmp_path / "model", card="")
    (agreement,) = export.verify(
        tmp_path / "model", tmp_path / "model", images=[str(path) for path in images], phrases="left lung. tumor. cell"
    )
    assert agreement.images == len(images) >= 8
    assert agreement.detections > 100
    assert agreement.holds, agreement.describe()


def test_files_for_the_originals_are_read_back(tiny_config, tmp_path, capsys):
    """mmdetection and Microsoft build some sizes whatever their configuration says; other models are refused."""
    pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")
    config = tiny_config.copy_and_resolve_references()
    rng = np.random.default_rng(0)
    config.model.fpn.channels, config.model.tower.norm_groups = 256, 16
    config.model.tower.fusion_dim, config.model.tower.fusion_heads = 2048, 8
    bert = config.model.bert
    bert.vocab_size, bert.hidden_size, bert.num_layers, bert.num_heads = 30522, 768, 1, 12
    bert.intermediate_size, bert.max_positions = 3072, 512
    from medglip_jax.inference import parameter_shapes
    from medglip_jax.model.detector import GLIP

    shapes = parameter_shapes(GLIP(config.model), config)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    write_folder(params, config, load_tokenizer(), tmp_path / "model", card="")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "mmdet"), "--format", "mmdet"]
    assert export.main([*arguments, "--verify"]) == 0
    assert f"read back: {len(jax.tree.leaves(params))} parameters, bit for bit" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "mmdet").iterdir()}
    assert names == {"model.pth", "glip_config.py", "bert"}
    compile((tmp_path / "mmdet" / "glip_config.py").read_text(), "glip_config.py", "exec")

    arguments = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "glip"), "--format", "glip"]
    assert export.main([*arguments, "--verify"]) == 0
    assert {path.name for path in (tmp_path / "glip").iterdir()} == {"model.pth", "glip_config.yaml", glip.BERT}
