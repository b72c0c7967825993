"""Two real processes on loopback train and evaluate like one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.configuration import save_config

_RUN = """
import sys, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from medglip_jax.train import main
sys.exit(main(sys.argv[3:]))
"""


def start(devices: int, cache: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _RUN, str(devices), cache, *arguments]
    # Threads of the runtime, by default as many as cores: devices of two processes wait for each other in collectives,
    # for ever where a waiting device holds the thread that the other one needs.
    environment = {**os.environ, "PJRT_NPROC": "16", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-3000:]


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    build(Phantoms(13, size=64, seed=3), folder / "all", name="phantoms", progress=False)
    config = tiny_config.copy_and_resolve_references()
    config.data.train = config.data.eval = str(folder / "all")
    config.data.max_tokens, config.data.max_boxes = 64, 32
    config.data.batch_size = config.data.eval_batch_size = 4
    config.mesh.fsdp = 2
    model = config.model
    assert model.swin.drop_path and model.fpn.drop_block and model.bert.dropout and model.tower.fusion_dropout
    config.schedule.steps, config.schedule.warmup_steps, config.training.log_every = 4, 1, 1
    save_config(config, folder / "recipe.json")
    return folder / "recipe.json"


def test_two_processes_give_the_losses_and_the_precision_of_one(recipe, tmp_path):
    import jax

    cache = str(jax.config.jax_compilation_cache_dir)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    arguments = ["--config", str(recipe), "--workdir", str(tmp_path / "two")]
    pair = [
        start(
            2,
            cache,
            arguments,
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    for process in pair:
        finish(process)
    finish(start(4, cache, ["--config", str(recipe), "--workdir", str(tmp_path / "one")]))

    def read(name: str):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads((tmp_path / name / "evaluation.json").read_text())

    (steps_of_two, of_two), (steps_of_one, of_one) = read("two"), read("one")
    assert len(steps_of_two) == len(steps_of_one) > 4
    names = ("loss", "loss_token", "loss_box", "loss_centerness", "num_positives", "grad_norm", "learning_rate")
    for ours, theirs in zip(steps_of_two, steps_of_one, strict=True):
        for name in names:
            if name in theirs:  # the last line is of the evaluation
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} {theirs['step']}")
    assert of_two["images"] == of_one["images"] == 13
    assert of_two["AP50"] == pytest.approx(of_one["AP50"], abs=1e-3)
