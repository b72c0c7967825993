"""Fine-tuning through `train` in each mode, from a run of a stand-in model: evaluated, stopped, gone on with, read."""

import json
import shutil

import jax
import numpy as np
import pytest

from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax import evaluate, pretrained, sharding
from medglip_jax import train as train_module
from medglip_jax.configuration import save_config
from medglip_jax.pretrained import load_model
from medglip_jax.train import train
from medglip_jax.training.checkpoint import load_params
from tests.training.slim import Slim

MODES = {
    "heads": {"mode": "heads"},
    "frozen": {"frozen": ("^(backbone|language)/",), "layer_decay": 0.8},
    "lora": {"mode": "lora", "lora_rank": 2, "lora_patterns": ("(qkv|query|v_proj)/kernel",)},
    "prompt": {"mode": "prompt"},
}
MOVED = {  # parts of the model that are not those of the base any more
    "heads": {"head"},
    "frozen": {"tower_0", "head"},
    "lora": {"backbone", "language", "tower_0"},
    "prompt": set(),
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for module in (train_module, pretrained, sharding):
        monkeypatch.setattr(module, "make_model", lambda config: Slim())


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    records = tmp_path_factory.mktemp("records") / "phantoms"
    build(Phantoms(20, size=64, seed=3), records, name="phantoms", eval_fraction=0.3, progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"
    config.data.max_tokens, config.data.max_boxes, config.model.bert.hidden_size = 64, 32, 8
    config.detection.score_threshold = 0.0
    config.schedule.steps, config.schedule.warmup_steps = 2, 0
    config.optimizer.learning_rate, config.optimizer.ema = 1e-2, 0.5
    config.training.checkpoint_every, config.training.log_every, config.training.keep_checkpoints = 1, 1, 9
    return config


@pytest.fixture(scope="module")
def base(recipe, tmp_path_factory):
    """The working directory of a run of everything."""
    workdir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_module, pretrained):
            patch.setattr(module, "make_model", lambda config: Slim())
        config = recipe.copy_and_resolve_references()
        config.data.eval = ""
        train(config, workdir)
    return workdir


def tuned_from(base, recipe, mode):
    config = recipe.copy_and_resolve_references()
    config.init.model, config.data.few_shot = str(base), 1
    config.finetune.update(MODES[mode])
    return config


@pytest.mark.parametrize("mode", MODES)
def test_run_from_a_run_goes_on_and_is_evaluated_as_it_is_read(base, recipe, mode, tmp_path, capsys):
    config = tuned_from(base, recipe, mode)
    config.data.eval = recipe.data.eval if mode in ("lora", "prompt") else ""
    results = train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")
    train(config, tmp_path / "stopped")
    for use_ema in (False, True):
        folders = tmp_path / "run", tmp_path / "stopped"
        jax.tree.map(np.testing.assert_array_equal, *(load_params(folder, use_ema)[0] for folder in folders))
    if results:
        output = tmp_path / "results.json"
        assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--output", str(output)]) == 0
        assert json.loads(output.read_text())["per_class"] == results["per_class"]

    params, before = load_model(tmp_path / "run")[1], load_params(base)[0]
    assert ("prompt" in params) == (mode == "prompt") and "lora" not in params
    moved = {
        name: any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (params[name], part)), strict=True))
        for name, part in before.items()
    }
    assert {name for name, value in moved.items() if value} == MOVED[mode]


@pytest.mark.parametrize("mode", MODES)
def test_sharding_command_counts_the_state_of_what_trains(base, recipe, mode, tmp_path, capsys):
    save_config(tuned_from(base, recipe, mode), tmp_path / "config.json")
    report = tmp_path / "report.json"
    assert sharding.main(["--config", str(tmp_path), "--mesh", "fsdp=4,tensor=2", "--json", str(report)]) == 0
    totals = json.loads(report.read_text())["totals"]
    trained = totals["ema"]["bytes"]
    assert 0 < trained < totals["parameters"]["bytes"]
    assert 2 * trained < totals["optimizer"]["bytes"] <= 2 * trained + 16  # and two counters
