"""The whole way through with the tiny model: train, resume, evaluate, export, demo."""

import json
import os
import pathlib
import re
import signal

import jax
import numpy as np
import pytest
from flax import traverse_util

from data_pipelines.build import build
from data_pipelines.records import RecordsError
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax import demo, evaluate, export, pretrained
from medglip_jax import train as train_module
from medglip_jax.configuration import save_config
from medglip_jax.errors import Preempted
from medglip_jax.predict import MedGLIP
from medglip_jax.pretrained import load_model
from medglip_jax.train import train
from medglip_jax.training.checkpoint import Checkpoints, load_params
from medglip_jax.training.finetuning import add_parameters
from medglip_jax.training.state import TrainState
from tests.training.slim import Slim


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "phantoms"
    build(Phantoms(20, size=64, seed=3), folder, name="phantoms", eval_fraction=0.3, progress=False)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_config, records):
    """Four steps with a checkpoint after each second one."""
    config = tiny_config.copy_and_resolve_references()
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"
    config.data.max_tokens, config.data.max_boxes = 64, 32  # a phantom CT has up to 57 tokens of phrases
    config.model.swin.depths = (1, 1, 1, 1)  # compiling is what takes the time here
    config.schedule.steps, config.schedule.warmup_steps = 4, 1
    config.training.checkpoint_every, config.training.log_every = 2, 1
    return config


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The working directory of a finished run, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(recipe, workdir)


def logged(workdir: pathlib.Path, name: str = "loss") -> list[dict]:
    """The lines of the log that have a metric."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if name in line]


def change(recipe, **fields):
    """Returns the recipe with fields replaced: `change(recipe, schedule__steps=2)`."""
    config = recipe.copy_and_resolve_references()
    for path, value in fields.items():
        group, name = path.split("__")
        config[group][name] = value
    return config


def test_run_leaves_what_the_documentation_lists(run):
    workdir, results = run
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "tokenizer", "checkpoints", "metrics.jsonl", "tensorboard"}
    assert names >= {"evaluation.json", "predictions.png"}
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert {"AP", "AP50", "AP75", "per_class", "per_modality"} <= results.keys()
    assert [line["step"] for line in logged(workdir)] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in logged(workdir))
    assert [line["step"] for line in logged(workdir, "eval_AP")] == [4]


def test_run_tells_its_speed_and_where_its_time_went(run, recipe):
    workdir, _ = run
    names = {"step_seconds", "loader_seconds", "images_per_second", "images_per_second_per_device"}
    assert all(names <= line.keys() for line in logged(workdir)[1:])
    assert logged(workdir, "compile_seconds")[0]["step"] == 1
    for line in logged(workdir)[1:]:
        assert line["images_per_second"] == pytest.approx(recipe.data.batch_size / line["step_seconds"])
    told = json.loads((workdir / "goodput.json").read_text())
    assert all(told["seconds"][name] > 0 for name in ("start", "compile", "loader", "step", "checkpoint", "evaluation"))
    assert 0 < told["goodput"] < 1
    assert told["starts"][0]["last_step"] == recipe.schedule.steps


@pytest.fixture
def slim(monkeypatch):
    """A stand-in for the model, where a test is about the run and not about what it computes."""
    for module in (train_module, pretrained):
        monkeypatch.setattr(module, "make_model", lambda config: Slim())


def test_stopped_run_goes_on_as_if_it_had_not_stopped(slim, recipe, tmp_path, monkeypatch):
    alone = train(recipe, tmp_path / "alone")
    batches = []

    def stop_in_third_step(batch, mesh, to_global=train_module.to_global):
        batches.append(list(batch["image_id"]))
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_global(batch, mesh)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped after step 3"):
        patch.setattr(train_module, "to_global", stop_in_third_step)
        train(recipe, tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("resume", 3)
    with Checkpoints(tmp_path / "run", 1) as checkpoints:
        assert checkpoints.latest_step == 3
    results = train(recipe, tmp_path / "run")

    for use_ema in (False, True):
        uninterrupted, resumed = (load_params(tmp_path / name, use_ema=use_ema)[0] for name in ("alone", "run"))
        jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    assert results["AP"] == alone["AP"]
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]
    assert [line["loss"] for line in logged(tmp_path / "run")] == [line["loss"] for line in logged(tmp_path / "alone")]


def test_checkpoint_of_another_model_is_refused_and_stays(run, recipe):
    other = recipe.copy_and_resolve_references()
    other.model.fpn.channels = 32
    before = (run[0] / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"another model or optimizer:\n  params/.*\(.*16"):
        train(other, run[0])
    assert (run[0] / "config.json").read_bytes() == before
    with Checkpoints(run[0], 9) as checkpoints:
        assert checkpoints.latest_step == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__batch_size": 9}, r"config\.data\.batch_size is 9.*multiple of 8"),
        ({"data__eval_batch_size": 9}, r"config\.data\.eval_batch_size is 9.*multiple of 8"),
        ({"data__max_tokens": 65}, r"config\.data\.max_tokens is 65"),
        ({"data__train": ""}, r"config\.data\.train is empty"),
        ({"data__eval": "/nowhere"}, "holds no records"),
        ({"training__accumulation": 2}, r"config\.training\.accumulation is 2.*\(8\) must be a multiple of it times 8"),
        ({"training__accumulation": 0}, r"config\.training\.accumulation is 0"),
        ({"training__keep_checkpoints": 0}, "keep_checkpoints"),
    ],
)
def test_mistakes_in_a_recipe_are_named_before_training(recipe, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(change(recipe, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tokenizer_larger_than_the_model_is_refused(recipe, tmp_path):
    config = recipe.copy_and_resolve_references()
    config.model.bert.vocab_size = 100
    with pytest.raises(ValueError, match=r"config\.model\.bert\.vocab_size is 100"):
        train(config, tmp_path)


def test_shard_cut_in_half_is_an_error_that_names_it(recipe, tmp_path):
    build(Phantoms(8, size=64), tmp_path / "cut", name="cut", progress=False)
    shard = next((tmp_path / "cut").glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(RecordsError, match=f"{shard.name}.* cut short"):
        train(change(recipe, data__train=str(tmp_path / "cut")), tmp_path / "run")


def test_finished_run_is_only_evaluated_again_and_unknown_fields_are_named(run, recipe, tmp_path, capsys):
    before = (run[0] / "metrics.jsonl").read_bytes()
    save_config(recipe, tmp_path / "tiny.json")
    arguments = ["--config", str(tmp_path / "tiny.json"), "--workdir", str(run[0])]
    assert train_module.main([*arguments, "--config.schedule.stesp=3"]) == 1
    assert "the nearest is config.schedule.steps" in capsys.readouterr().err
    assert train_module.main([*arguments, "--config.schedule.steps=4"]) == 0
    assert "AP50" in capsys.readouterr().out
    assert json.loads((run[0] / "evaluation.json").read_text())["AP"] == run[1]["AP"]
    assert (run[0] / "metrics.jsonl").read_bytes() == before


def test_evaluate_command_writes_the_same_results(run, tmp_path, records, capsys):
    output = tmp_path / "out" / "results.json"
    arguments = ["--checkpoint", str(run[0]), "--data", f"{records}:validation", "--output", str(output)]
    assert evaluate.main(arguments) == 0
    results = json.loads(output.read_text())
    assert {name: results[name] for name in ("AP", "AP50", "AP75", "per_class")} == {
        name: run[1][name] for name in ("AP", "AP50", "AP75", "per_class")
    }
    assert evaluate.main(["--checkpoint", str(tmp_path), "--data", str(records)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_export_is_read_back_exactly(run, tmp_path, capsys):
    assert export.main(["--checkpoint", str(run[0]), "--output", str(tmp_path / "export")]) == 0
    params, config = export.read_export(tmp_path / "export")
    trained, recipe = load_params(run[0])
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    assert config.model == recipe.model and config.detection == recipe.detection
    card = (tmp_path / "export" / "README.md").read_text()
    assert "running average" in card and f"AP50 {run[1]['AP50']:.3f}" in card


def test_export_of_the_parameters_themselves(run, tmp_path, capsys):
    assert export.main(["--checkpoint", str(run[0]), "--output", str(tmp_path / "export"), "--no-ema"]) == 0
    params, _ = export.read_export(tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(run[0], use_ema=False)[0])
    assert "AP50" not in (tmp_path / "export" / "README.md").read_text()  # the average was evaluated
    again = ["--checkpoint", str(tmp_path / "export"), "--output", str(tmp_path / "again")]
    assert export.main(again) == 0  # an export is a checkpoint
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "again")]
    assert weights[0] == weights[1]


@pytest.fixture
def tuned(run, recipe, tmp_path):
    """Returns a function that writes a fine-tuned run without training it: what the mode adds, changed at random."""

    def write(fields, changed, seed=0):
        config = change(recipe, init__model=str(run[0]), optimizer__ema=0.0)
        config.finetune.update(fields)
        params, key = load_params(run[0])[0], jax.random.key(0)
        flat = traverse_util.flatten_dict(add_parameters(params, config, key), sep="/")
        rng = np.random.default_rng(seed)
        flat |= {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items() if changed(path)}
        params = traverse_util.unflatten_dict(flat, sep="/")
        with Checkpoints(tmp_path / "tuned", 1) as checkpoints:
            checkpoints.save(1, TrainState(step=np.int32(1), params=params, opt_state={}, ema=None, rng=key))
        save_config(config, tmp_path / "tuned" / "config.json")
        return tmp_path / "tuned"

    return write


def test_adapters_are_exported_merged(run, tuned, tmp_path, capsys):
    folder = tuned({"mode": "lora", "lora_rank": 2}, lambda path: path.startswith("lora/") and path.endswith("/b"))
    params, config = load_params(folder)
    base, merged = (traverse_util.flatten_dict(x, sep="/") for x in (load_params(run[0])[0], params))
    assert merged.keys() == base.keys()
    changed = {path for path, x in merged.items() if not np.array_equal(x, base[path])}
    patterns = config.finetune.lora_patterns
    assert changed == {path for path in base if any(re.search(pattern, path) for pattern in patterns)}
    assert export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "export")]) == 0
    jax.tree.map(np.testing.assert_array_equal, export.read_export(tmp_path / "export")[0], params)


def test_learned_offsets_are_no_model_to_export_or_to_start_from(run, recipe, tuned, tmp_path, capsys):
    folder = tuned({"mode": "prompt"}, lambda path: False)
    assert export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "export")]) == 1
    assert "its weights are those it started from" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"is a run of prompt tuning.*start from what it started from .{run[0]}"):
        train(change(recipe, init__model=str(folder)), tmp_path / "again")


def test_export_keeps_what_is_not_its_own(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert export.main(["--checkpoint", str(run[0]), "--output", str(tmp_path)]) == 1
    assert "holds no model.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert export.main(["--checkpoint", str(run[0]), "--output", str(run[0])]) == 1


def test_damaged_export_is_refused(run, tmp_path):
    _, params, config, tokenizer = load_model(run[0])
    weights = export.export(params, config, tokenizer, tmp_path / "export")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        export.read_export(tmp_path / "export")


def test_trained_model_predicts(run):
    prediction = MedGLIP.from_pretrained(run[0]).predict(
        np.zeros((50, 70, 3), np.uint8), ["left lung", "liver"], threshold=0
    )
    assert prediction.boxes.shape == (len(prediction), 4)
    assert (prediction.boxes <= [70, 50, 70, 50]).all() and (prediction.boxes >= 0).all()


def test_demo_makes_everything_and_says_where(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PHANTOMS", 40)
    save_config(recipe, tmp_path / "tiny.json")
    arguments = ["--workdir", str(tmp_path / "run"), "--config", str(tmp_path / "tiny.json")]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    for path in ("checkpoints/4", "export/model.safetensors", "predictions.png"):
        assert (tmp_path / "run" / path).exists()
        assert str(tmp_path / "run" / path) in printed
    assert "AP50" in printed
    assert demo.main([*arguments, "--data", str(tmp_path)]) == 1
    assert "demo of other data" in capsys.readouterr().err


def test_demo_of_an_empty_folder_says_what_it_reads(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert demo.main(["--workdir", str(tmp_path / "run"), "--data", str(tmp_path / "empty")]) == 1
    assert "is empty" in capsys.readouterr().err
