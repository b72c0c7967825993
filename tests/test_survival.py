"""A run that is killed or told to stop, at bad moments, comes to the numbers of one that is left alone.

The model is a stand-in: what is tested here is everything around it. benchmarks/chaos.py kills runs of GLIP.
"""

import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from benchmarks.chaos import TrainingProcesses, is_saving, losses
from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax import pretrained
from medglip_jax import train as train_module
from medglip_jax.configuration import save_config
from medglip_jax.errors import Preempted
from medglip_jax.train import train
from medglip_jax.training.checkpoint import Checkpoints, load_params
from medglip_jax.training.nonfinite import NonFiniteLoss
from tests.training import slim_train
from tests.training.slim import Slim


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    build(Phantoms(13, size=64, seed=3), folder, name="phantoms", progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train = str(folder)
    config.data.max_tokens, config.data.max_boxes = 64, 32
    config.schedule.steps, config.schedule.warmup_steps = 24, 1
    config.training.checkpoint_every, config.training.log_every = 4, 1
    return config


@pytest.fixture
def alone(recipe, tmp_path, monkeypatch):
    """The losses of a run that nothing happened to."""
    use(monkeypatch, slim_train.stand_in)
    workdir = tmp_path / "alone"
    train(recipe, workdir)
    found = losses(workdir)
    assert sorted(found) == list(range(1, recipe.schedule.steps + 1))
    return found


def use(monkeypatch, make_model):
    for module in (train_module, pretrained):
        monkeypatch.setattr(module, "make_model", make_model)


def until(condition, started, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert started.processes[0].poll() is None, started.read()[-3000:]
        assert time.monotonic() < end, started.read()[-3000:]
        time.sleep(0.002)


def status_of(workdir):
    return json.loads((workdir / "status.json").read_text())["status"]


def test_a_run_that_is_killed_and_stopped_comes_to_the_same_losses(recipe, alone, tmp_path):
    config = recipe.copy_and_resolve_references()
    config.data.num_workers = 1
    file, workdir = tmp_path / "recipe.json", tmp_path / "run"
    save_config(config, file)
    start = {"devices": len(jax.devices()), "module": slim_train.__name__}

    with TrainingProcesses(file, workdir, **start) as started:
        until(lambda: len(losses(workdir)) >= 6, started)
        until(lambda: is_saving(workdir), started)
        started.processes[0].kill()
        assert started.wait() == [-signal.SIGKILL]
    assert status_of(workdir) == "running"
    with TrainingProcesses(file, workdir, **start) as started:
        until(lambda: status_of(workdir) == "running" and max(losses(workdir), default=0) > 12, started)
        os.killpg(started.processes[0].pid, signal.SIGTERM)  # its decode processes get the signal too
        assert started.wait() == [0], started.read()[-3000:]
        assert "resume: stopped after step" in started.read()
    assert status_of(workdir) == "resume"
    with TrainingProcesses(file, workdir, **start) as started:
        started.finish()
    assert status_of(workdir) == "finished"
    assert losses(workdir) == alone


@pytest.mark.parametrize("later", [0.3, 3.0])  # while the decode process imports, and when it has begun
def test_decode_processes_do_not_outlive_a_killed_run(recipe, tmp_path, later):
    config = recipe.copy_and_resolve_references()
    config.data.num_workers = 1
    save_config(config, tmp_path / "recipe.json")
    with TrainingProcesses(tmp_path / "recipe.json", tmp_path / "run", module=slim_train.__name__) as started:
        group = started.processes[0].pid  # a session of its own: all its children are in it
        until(lambda: len(members(group)) > 1, started)
        time.sleep(later)
        started.processes[0].kill()
        started.wait()
        end = time.monotonic() + 60
        while members(group) and time.monotonic() < end:
            time.sleep(0.1)
        assert not members(group)


def members(group):
    """The processes of a group, from /proc."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = pathlib.Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.fixture
def short(recipe, monkeypatch):
    """A run of a stand-in model: what follows is about the steps, not about what they compute."""
    use(monkeypatch, lambda config: Slim())
    config = recipe.copy_and_resolve_references()
    config.schedule.steps = 6
    return config


def test_signal_in_an_evaluation_saves_the_step_and_ends_it(short, tmp_path, monkeypatch):
    short.data.eval = short.data.train
    short.training.eval_every = 3  # not a step that is saved anyway

    def stop(*arguments, between_batches, **others):
        os.kill(os.getpid(), signal.SIGTERM)
        between_batches()
        pytest.fail("the evaluation went on")

    monkeypatch.setattr(train_module, "evaluate_records", stop)
    with pytest.raises(Preempted, match="stopped after step 3"):
        train(short, tmp_path)
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.latest_step == 3
    assert status_of(tmp_path) == "resume"


def test_evaluated_steps_are_saved_scored_and_the_best_stays(short, tmp_path, monkeypatch):
    short.data.eval = short.data.train
    short.training.checkpoint_every, short.training.keep_checkpoints = 4, 1
    short.training.eval_every, short.training.keep_best, short.training.best_metric = 2, 1, "AP50"
    scores = iter([0.5, 0.2, 0.1])

    def results(*arguments, sheet, **others):
        from PIL import Image

        Image.new("RGB", (4, 4)).save(sheet)
        return {"AP": 0.0, "AP50": next(scores), "AP75": None, "images": 1}

    monkeypatch.setattr(train_module, "evaluate_records", results)
    train(short, tmp_path)
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.best_step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["2", "6"]
    best, _ = load_params(tmp_path / "checkpoints" / "best")
    second, _ = load_params(tmp_path / "checkpoints" / "2")
    jax.tree.map(np.testing.assert_array_equal, best, second)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the batches of some steps, counted from 1, ones without a finite loss; returns the images of all."""
    images = []

    def make(*steps, to_global=train_module.to_global):
        def poison(batch, mesh):
            if "boxes" in batch:
                images.append(list(batch["image_id"]))
                if len(images) in steps:
                    batch = {**batch, "boxes": np.full_like(batch["boxes"], np.nan)}
            return to_global(batch, mesh)

        monkeypatch.setattr(train_module, "to_global", poison)
        return images

    return make


def test_steps_that_are_not_finite_are_skipped_up_to_the_limit(short, tmp_path, poisoned):
    short.training.max_nonfinite = 2
    images = poisoned(2, 5)
    train(short, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5]
    assert [line["image_ids"] for line in lines] == [images[1], images[4]]
    assert any(name.startswith("backbone/") for name in lines[0]["nonfinite_gradients"])
    assert sorted(losses(tmp_path)) == [1, 3, 4, 6]
    params, _ = load_params(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    goodput = json.loads((tmp_path / "goodput.json").read_text())
    assert goodput["seconds"]["skipped"] > 0


def test_one_more_than_the_limit_ends_the_run(short, tmp_path, poisoned):
    short.training.max_nonfinite = 1
    images = poisoned(2, 3)
    with pytest.raises(NonFiniteLoss, match=r"after 2 steps .*1 such steps were skipped") as error:
        train(short, tmp_path)
    assert list(error.value.image_ids) == images[2]
    assert status_of(tmp_path) == "failed"


def test_without_a_limit_the_first_one_ends_the_run(short, tmp_path, poisoned):
    poisoned(1)
    with pytest.raises(NonFiniteLoss, match="after 0 steps"):
        train(short, tmp_path)
