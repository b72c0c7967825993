"""Pretraining from the recipe to grounding that starts from it; stand-in models, for what they compute is elsewhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.build import build
from data_pipelines.captions import TEXTS
from data_pipelines.loader import train_loader
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax import evaluate, pretrained, probe
from medglip_jax import train as train_module
from medglip_jax.configuration import load_config
from medglip_jax.evaluation.probe import make_probe
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.planning.programs import train_batch
from medglip_jax.predict import MedGLIP
from medglip_jax.pretrained import pretrained_parameters
from medglip_jax.tasks import find_task
from medglip_jax.train import train
from medglip_jax.training.checkpoint import load_params
from tests.training.slim import Slim
from tests.training.towers import Towers


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for module in (train_module, pretrained):
        monkeypatch.setattr(module, "make_model", lambda config: Towers() if config.pretraining.task else Slim())


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    records = tmp_path_factory.mktemp("records") / "phantoms"
    build(Phantoms(24, size=64, seed=3), records, name="phantoms", eval_fraction=0.3, progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"
    config.data.max_boxes, config.data.max_descriptions = 32, 4
    config.pretraining.probe_images, config.pretraining.probe_steps = 8, 5
    config.schedule.steps, config.schedule.warmup_steps = 2, 1
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
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_module, pretrained):
            patch.setattr(module, "make_model", lambda config: Towers())
        return workdir, config, train(config, workdir)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("text", TEXTS)
def test_plan_knows_the_batches_of_the_loader(recipe, text):
    config = recipe.copy_and_resolve_references()
    config.data.text, config.data.max_tokens = text, 64
    loader = train_loader(config.data, seed=0, batch_size=8, process_index=0, process_count=1)
    batch = next(loader)
    loader.close()
    planned = {name: (x.shape, x.dtype) for name, x in train_batch(config, 8, None).items()}
    assert planned == {name: (batch[name].shape, batch[name].dtype) for name in planned}
    assert batch.keys() - planned.keys() == {"modality", "image_id"}


@pytest.mark.parametrize("name", ["pretrain_contrastive", "pretrain_masked_image", "pretrain_regions"])
def test_recipes_fit_their_tasks(name):
    config = load_config(name)
    task = find_task(config)
    assert task is not None and config.training.best_metric in task.scores


def test_run_is_evaluated_as_its_task_is(contrastive, tmp_path, capsys):
    workdir, _, results = contrastive
    images = sum(entry["images"] for entry in results["per_modality"].values())
    assert 0 <= results["AUROC"] <= 1 and results["images"] == images > 0
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert {"loss", "logit_scale", "grad_norm"} <= lines_of(workdir)[0].keys()
    assert "eval_AUROC_within" in lines_of(workdir)[-1]
    assert not (workdir / "predictions.png").exists()
    assert evaluate.main(["--checkpoint", str(workdir), "--output", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["per_class"] == results["per_class"]
    assert "AUROC_within" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(workdir), "--sheet", "a.png"]) == 1
    assert "has no boxes to draw" in capsys.readouterr().err


def test_stopped_run_goes_on_with_the_same_numbers(contrastive, tmp_path):
    workdir, config, _ = contrastive
    half = config.copy_and_resolve_references()
    half.schedule.kind, half.schedule.steps, half.data.eval = "cosine", 1, ""
    whole = half.copy_and_resolve_references()
    whole.schedule.steps = 2
    train(half, tmp_path)
    train(whole, tmp_path)
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
    assert told[0].endswith(": 5 parameters") and told[1] == "  taken: backbone 3, language 2"
    assert told[2] == "  left there: image_projection 1, language 1, log_scale 1, logit_bias 1"
    assert told[3] == "  from random numbers: head 3, language 1, tower_0 1"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((), r"is a run of the task 'contrastive', and this one is of 'grounding': say with config\.init"),
        (("^backbone/", "^nek/"), r"config\.init\.patterns: '\^nek/' is found in the path of no parameter"),
        (("^head/",), r"config\.init\.patterns: '\^head/' is found in the path of no parameter"),
    ],
)
def test_what_cannot_be_taken_is_told(contrastive, recipe, patterns, message):
    config = recipe.copy_and_resolve_references()
    config.init.model, config.init.patterns = str(contrastive[0]), patterns
    with pytest.raises(ValueError, match=message):
        pretrained_parameters(config)


def test_part_that_is_smaller_there_is_not_filled_up_in_silence(contrastive, recipe, monkeypatch):
    config = recipe.copy_and_resolve_references()
    config.init.model, config.init.patterns = str(contrastive[0]), ("^backbone/",)
    larger = {"params": {"backbone": {"stage_9": {"kernel": jnp.zeros((8, 8))}}}}
    monkeypatch.setattr(Slim, "init", lambda self, key, *inputs: larger)
    with pytest.raises(ValueError, match=r"other sizes:\n(.*\n)*.*backbone/stage_9/kernel: missing in the checkpoint"):
        pretrained_parameters(config)


def test_pretrained_run_is_no_detector(contrastive):
    with pytest.raises(ValueError, match=r"task contrastive, which finds no boxes: start grounding from it"):
        MedGLIP.from_pretrained(contrastive[0])


def test_wrong_metric_is_told(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"best_metric is 'AP': expected recall@1, recall@5"):
        train(stage(recipe, "region_caption", "descriptions", "AP"), tmp_path)


def test_regions_are_looked_for_among_all_descriptions(recipe, tmp_path):
    results = train(stage(recipe, "region_caption", "descriptions", "recall@1"), tmp_path)
    assert 0 <= results["recall@1"] <= results["recall@5"] <= 1
    assert results["images"] < results["regions"] <= 4 * results["images"]
    assert results["chance@1"] == pytest.approx(1 / results["texts"])


def test_probe_learns_from_a_part_of_the_training_records(recipe, capsys):
    swin = Swin(recipe.model.swin, jnp.float32)
    shapes = jax.eval_shape(lambda key: swin.init(key, jnp.zeros((1, 64, 64, 3)), False), jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    backbone = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    found = make_probe(recipe, make_mesh(recipe.mesh))({"backbone": backbone}, recipe.data.eval)
    assert found["train_images"] <= 8 and np.isfinite(found["slope"]) and 0 <= found["AUROC"] <= 1
    assert probe.main(["--data", recipe.data.eval]) == 1
    assert "give --checkpoint DIR, or --config FILE" in capsys.readouterr().err
