"""Pretraining from the recipe to grounding that starts from it."""

import json

import jax
import numpy as np
import pytest

from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax import evaluate, probe
from medglip_jax.predict import MedGLIP
from medglip_jax.pretrained import pretrained_parameters
from medglip_jax.train import train
from medglip_jax.training.checkpoint import load_params


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    records = tmp_path_factory.mktemp("records") / "phantoms"
    build(Phantoms(24, size=64, seed=3), records, name="phantoms", eval_fraction=0.3, progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"
    config.data.max_boxes, config.model.swin.depths = 32, (1, 1, 1, 1)
    config.data.max_descriptions, config.pretraining.embed_dim = 4, 16
    config.pretraining.probe_images, config.pretraining.probe_steps = 8, 5
    config.schedule.steps, config.schedule.warmup_steps = 2, 1
    config.optimizer.learning_rate = 1e-2
    config.training.checkpoint_every, config.training.log_every = 1, 1
    return config


def stage(recipe, task, text, metric):
    config = recipe.copy_and_resolve_references()
    config.pretraining.task, config.data.text, config.training.best_metric = task, text, metric
    return config


@pytest.fixture(scope="module")
def contrastive(recipe, tmp_path_factory):
    """The working directory of a run, its recipe, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("contrastive")
    config = stage(recipe, "contrastive", "captions", "AUROC_within")
    return workdir, config, train(config, workdir)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_run_is_evaluated_as_its_task_is(contrastive, tmp_path, capsys):
    workdir, _, results = contrastive
    assert 0 <= results["AUROC"] <= 1 and results["images"] == len(results["per_modality"])
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert {"loss", "logit_scale", "grad_norm"} <= lines_of(workdir)[0].keys()
    assert "eval_AUROC_within" in lines_of(workdir)[-1]
    assert not (workdir / "predictions.png").exists()
    assert evaluate.main(["--checkpoint", str(workdir), "--output", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["per_class"] == results["per_class"]
    assert "AUROC_within" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(workdir), "--sheet", "a.png"]) == 1


def test_stopped_run_goes_on_with_the_same_numbers(contrastive, tmp_path):
    workdir, config, _ = contrastive
    half = config.copy_and_resolve_references()
    half.schedule.steps, half.data.eval = 1, ""
    train(half, tmp_path)
    half.schedule.steps = 2
    train(half, tmp_path)
    wanted = [line["loss"] for line in lines_of(workdir) if "loss" in line]
    assert [line["loss"] for line in lines_of(tmp_path) if "loss" in line] == wanted


def test_grounding_starts_from_what_the_patterns_say(contrastive, recipe):
    workdir, _, _ = contrastive
    config, told = recipe.copy_and_resolve_references(), []
    config.init.model, config.init.patterns = str(workdir), ("^backbone/", "^language/layer")
    found = pretrained_parameters(config, told.append)
    trained, _ = load_params(workdir)
    assert found.keys() == {"backbone", "language"} and found["language"].keys() == {"layer_0"}
    jax.tree.map(np.testing.assert_array_equal, found["backbone"], trained["backbone"])
    assert "taken: backbone" in told[1] and "image_projection 2" in told[2] and "tower_0" in told[3]


@pytest.mark.parametrize(
    ("patterns", "depths", "message"),
    [
        (
            (),
            (1, 1, 1, 1),
            r"is a run of the task 'contrastive', and this one is of 'grounding': say with config\.init",
        ),
        (
            ("^backbone/", "^nek/"),
            (1, 1, 1, 1),
            r"config\.init\.patterns: '\^nek/' is found in the path of no parameter",
        ),
        (("^head/",), (1, 1, 1, 1), r"config\.init\.patterns: '\^head/' is found in the path of no parameter"),
        (("^backbone/",), (1, 2, 1, 1), r"other sizes:\n.*backbone/stage_1_block_1.*missing in the checkpoint"),
    ],
)
def test_what_cannot_be_taken_is_told(contrastive, recipe, patterns, depths, message):
    config = recipe.copy_and_resolve_references()
    config.init.model, config.init.patterns, config.model.swin.depths = str(contrastive[0]), patterns, depths
    with pytest.raises(ValueError, match=message):
        pretrained_parameters(config)


def test_pretrained_run_is_no_detector(contrastive):
    with pytest.raises(ValueError, match=r"task contrastive, which finds no boxes: start grounding from it"):
        MedGLIP.from_pretrained(contrastive[0])


def test_wrong_metric_is_told(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"best_metric is 'AP': expected recall@1, recall@5"):
        train(stage(recipe, "region_caption", "descriptions", "AP"), tmp_path)


def test_regions_are_aligned_and_looked_for(recipe, tmp_path):
    results = train(stage(recipe, "region_caption", "descriptions", "recall@1"), tmp_path)
    assert 0 <= results["recall@1"] <= results["recall@5"] <= 1
    assert results["texts"] <= results["regions"] <= 4 * results["images"]


def test_masked_images_are_probed_and_any_backbone_can_be(recipe, contrastive, tmp_path, capsys):
    results = train(stage(recipe, "masked_image", "none", "AUROC"), tmp_path)
    assert results["train_images"] <= 8 and np.isfinite(results["slope"])
    assert all(np.isfinite(line["loss"]) for line in lines_of(tmp_path) if "loss" in line)
    output = tmp_path / "probe.json"
    assert probe.main(["--checkpoint", str(contrastive[0]), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["images"] == results["images"]
    assert probe.main(["--data", recipe.data.eval]) == 1
    assert "give --checkpoint DIR, or --config FILE" in capsys.readouterr().err
