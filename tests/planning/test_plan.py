"""`medglip plan`: the real train step of a tiny model, compiled for TPUs where libtpu is there, and its mistakes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from medglip_jax import plan
from medglip_jax.configuration import save_config
from medglip_jax.planning import topology as topology_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Beside the environment, not in it: JAX would look for TPUs at every start.
LIBTPU = pathlib.Path(os.environ.get("LIBTPU_DIR", ROOT / ".venv" / "libtpu"))

has_libtpu = importlib.util.find_spec("libtpu") is not None or (LIBTPU / "libtpu").is_dir()


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_config):
    """Plans the tiny recipe for two slices of four chips, in a process of its own, twice."""
    if not has_libtpu:
        pytest.skip(f"needs libtpu: pip install --no-deps --target {LIBTPU} libtpu")
    folder = tmp_path_factory.mktemp("plan")
    config = tiny_config.copy_and_resolve_references()
    config.model.dtype, config.sharding = "bfloat16", "hsdp"
    config.mesh.replica, config.mesh.data, config.mesh.fsdp = 2, 2, 2
    save_config(config, folder / "tiny.json")
    output = folder / "plan.json"
    command = [sys.executable, "-m", "medglip_jax.plan", "--config", str(folder / "tiny.json")]
    command += ["--topology", "v5e:2x2", "--slices", "2", "--effort", "-1", "--no-eval", "--json", str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(LIBTPU)])}
    runs = []
    for _ in range(2):
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        runs.append((printed, json.loads(output.read_text())))
    return runs


def test_a_plan_tells_memory_flops_and_collectives(planned):
    printed, results = planned[0]
    sizes = results["bytes_per_device"]
    assert results["fits"] and results["devices"] == 8 and results["topology"] == "2 x v5e:2x2"
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] + sizes["code"]
    # Every parameter has its two moments and its average: four floats, of which fsdp splits some in two.
    assert sizes["arguments"] > 4 * 4 * results["parameters"] / 2
    assert "all-reduce (dcn)" in results["collectives"] and "all-reduce" in results["collectives"]
    assert results["unknown_loops"] == 0
    assert "images/s <=" in printed and "fits" in printed
    # The deformable convolutions read nine pixels for each one.
    assert any("dyconv" in name for name, _, _ in results["traffic"])
    assert 0.2 < sum(size for _, size, _ in results["traffic"]) / results["hbm_bytes"] <= 1


def test_the_compiled_step_does_the_flops_of_the_model(planned):
    """Forward and twice as much backward; the tiny model's padding to windows and tiles adds little."""
    results = planned[0][1]
    images_of_device = 1
    expected = 3 * results["forward_flops_per_image"] * images_of_device
    assert results["flops"] == pytest.approx(expected, rel=0.1)


def test_no_loop_goes_over_pixels(planned):
    """A scatter of patches, as the backward pass of a gather of patches, would be one on a TPU: run after run."""
    assert planned[0][1]["iterations"] < 1000


def test_what_was_compiled_before_is_taken_from_the_file(planned):
    assert planned[1][1] == planned[0][1]


def test_missing_libtpu_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topology_module.importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--config", "demo", "--topology", "v5e:2x2"]) == 1
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:2x2", "--batch", "0"], "--batch 0: at least 1"),
        (["--topology", "v5e:2x2", "--effort", "1"], "--effort 1.0: between -1 and 0"),
        (["--topology", "tpu"], "expected one of v4"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(options, message, capsys):
    assert plan.main(["--config", "demo", *options]) == 1
    assert message in capsys.readouterr().err


def test_another_file_in_the_place_of_the_results_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices()[:4])
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    assert plan.main(["--config", "demo", "--topology", "v5e:2x2", "--json", str(path)]) == 1
    assert "no result of medglip plan" in capsys.readouterr().err
    assert path.read_text() == '{"mine": 1}'
