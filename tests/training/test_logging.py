"""Metrics in files and progress without a terminal."""

import io
import json

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
