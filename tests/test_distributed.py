"""Two real processes on loopback train and evaluate like one.

The model is a stand-in; benchmarks/mesh_invariance.py and benchmarks/chaos.py train GLIP on two processes.
"""

import json
import signal
import time

import numpy as np
import pytest

from benchmarks.chaos import TrainingProcesses
from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.configuration import save_config
from tests.training import slim_train


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    build(Phantoms(13, size=64, seed=3), folder / "all", name="phantoms", progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train = config.data.eval = str(folder / "all")
    config.data.max_tokens, config.data.max_boxes = 64, 32
    config.data.batch_size = config.data.eval_batch_size = 4
    config.mesh.fsdp = 2
    config.schedule.steps, config.schedule.warmup_steps, config.training.log_every = 6, 1, 1
    save_config(config, folder / "recipe.json")
    return folder / "recipe.json"


def test_two_processes_one_of_them_told_to_stop_give_the_numbers_of_one(recipe, tmp_path):
    with TrainingProcesses(recipe, tmp_path / "two", processes=2, devices=2, module=slim_train.__name__) as pair:
        while not (tmp_path / "two" / "status.json").exists():
            assert pair.processes[0].poll() is None, pair.read()[-3000:]
            time.sleep(0.1)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [0, 0], pair.read(0)[-3000:] + pair.read(1)[-3000:]
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["status"] == "resume" and 0 <= status["step"] < 6  # in both processes, told to one
    with TrainingProcesses(recipe, tmp_path / "two", processes=2, devices=2, module=slim_train.__name__) as pair:
        pair.finish()
    with TrainingProcesses(recipe, tmp_path / "one", devices=4, module=slim_train.__name__) as single:
        single.finish()

    def read(name: str):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads((tmp_path / name / "evaluation.json").read_text())

    (steps_of_two, of_two), (steps_of_one, of_one) = read("two"), read("one")
    assert [line["step"] for line in steps_of_two] == [line["step"] for line in steps_of_one] == [*range(1, 7), 6]
    names = ("loss", "loss_token", "loss_box", "loss_centerness", "num_positives", "grad_norm", "learning_rate")
    for ours, theirs in zip(steps_of_two, steps_of_one, strict=True):
        for name in names:
            if name in theirs:  # the last line is of the evaluation
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} {theirs['step']}")
    assert of_two["images"] == of_one["images"] == 13
    assert of_two["AP50"] == pytest.approx(of_one["AP50"], abs=1e-3)
