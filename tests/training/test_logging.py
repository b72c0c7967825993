"""Metrics in files and progress without a terminal."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from medglip_jax.training.logging import MetricsLog, ProgressBar


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_to_json_lines_and_tensorboard(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "bad": float("nan")})
        assert lines(tmp_path)[0]["loss"] == 0.5  # on disk before it is closed
    assert lines(tmp_path)[0]["step"] == 1 and lines(tmp_path)[0]["bad"] is None
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_pictures_go_to_tensorboard(tmp_path):
    pixels = np.full((4, 6, 3), (250, 10, 90), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sheet.png")
    with MetricsLog(tmp_path) as log:
        log.write_image(3, "predictions", tmp_path / "sheet.png")
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"predictions" in content
    picture = content[content.index(b"\x89PNG") :]
    assert (np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) == pixels).all()


def test_resumed_run_has_every_step_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricsLog(tmp_path, start_step=2) as log:
        log.write(3, {"loss": 30})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_without_a_terminal_progress_is_a_line_every_few_seconds():
    out, now = io.StringIO(), iter(range(0, 100, 2))
    console = Console(file=out, force_terminal=False, width=40)
    with ProgressBar(10, 4, line_seconds=6, console=console, clock=lambda: next(now)) as bar:
        for step in range(1, 11):
            bar.update(step, loss=1.0 if step == 1 else None)
    assert out.getvalue().splitlines() == [
        "step 1/10  loss 1.0000",
        "step 4/10  loss 1.0000  2.0 images/s  ETA 0:00:12",
        "step 7/10  loss 1.0000  2.0 images/s  ETA 0:00:06",
        "step 10/10  loss 1.0000  2.0 images/s  ETA 0:00:00",
    ]


def test_on_a_terminal_progress_is_a_bar_with_the_same_numbers():
    out, now = io.StringIO(), iter(range(0, 100, 2))
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressBar(10, 4, start_step=2, console=console, clock=lambda: next(now)) as bar:
        bar.update(3, loss=1.0)
        bar.update(4)
        bar.pause()
        assert bar.images_per_second is None
        bar.update(5)
        bar.update(6)
    assert "step 6/10  loss 1.0000  2.0 images/s  ETA 0:00:08" in out.getvalue()


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.id, self.Image = [], "abc", np.shape

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


def test_weights_and_biases_gets_the_same_and_goes_on_with_its_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with MetricsLog(tmp_path, step - 1, wandb_project="organs", config={"seed": 3}) as log:
            log.write(step, {"loss": 0.5})
    begun, logged, ended = fake.calls[:3]
    assert (begun["project"], begun["config"], begun["id"]) == ("organs", {"seed": 3}, None)
    assert logged == (1, {"loss": 0.5}) and ended == "finish"
    assert fake.calls[3]["id"] == "abc"


def test_missing_weights_and_biases_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project is 'organs'.*pip install wandb"):
        MetricsLog(tmp_path, wandb_project="organs")
