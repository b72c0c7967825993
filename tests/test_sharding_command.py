"""`medglip sharding`: the table, its totals against arrays on eight devices, and its mistakes."""

import json
import math

import jax
import numpy as np
import pytest

from medglip_jax.configuration import save_config
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.sharding import main, parse_mesh
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state


@pytest.fixture
def recipe(tiny_config, tmp_path):
    save_config(tiny_config, tmp_path / "config.json")
    return str(tmp_path)


def report_of(recipe, tmp_path, *arguments):
    assert main(["--config", recipe, "--json", str(tmp_path / "report.json"), *arguments]) == 0
    return json.loads((tmp_path / "report.json").read_text())


def bytes_on_devices(tree):
    """Bytes of zeros of these shapes and shardings, in all and on each device."""
    held = dict.fromkeys(jax.devices(), 0)
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.ShapeDtypeStruct((2,), np.uint32, sharding=leaf.sharding)  # its words
        shard = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, shard=shard: shard)
        total += array.nbytes
        for piece in array.addressable_shards:
            held[piece.device] += piece.data.nbytes
    return total, set(held.values())


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "replica=2,fsdp=2,tensor=2"])
def test_totals_are_the_bytes_that_lie_on_the_devices(recipe, tiny_config, tmp_path, mesh, capsys):
    report = report_of(recipe, tmp_path, "--mesh", mesh)
    state = abstract_state(
        GLIP(tiny_config.model),
        tiny_config,
        make_optimizer(tiny_config),
        jax.random.key(0),
        make_mesh(parse_mesh(mesh)),
    )
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "ema": state.ema,
        "other": (state.step, state.rng),
        "state": state,
    }
    printed = capsys.readouterr().out
    for name, tree in parts.items():
        total, held = bytes_on_devices(tree)
        entry = report["totals"][name]
        assert (entry["bytes"], {entry["bytes_per_device"]}) == (total, held), name
        assert f"{total:,}" in printed and f"{entry['bytes_per_device']:,}" in printed
    for key in ("bytes", "bytes_per_device"):
        assert sum(entry[key] for entry in report["parameters"]) == report["totals"]["parameters"][key]
        assert report["totals"]["ema"][key] == report["totals"]["parameters"][key]


def test_every_parameter_is_a_line(recipe, tmp_path, capsys):
    report = report_of(recipe, tmp_path, "--mesh", "data=2,fsdp=4", "--config.sharding=fsdp")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    by_path = {line[0]: line for line in lines if line}
    for entry in report["parameters"]:
        line = by_path[entry["path"]]
        assert line[-1] == f"{entry['bytes_per_device']:,}" and entry["dtype"] in line
        parts = math.prod(report["mesh"][axis] for axes in entry["spec"] for axis in axes)
        assert entry["bytes"] == parts * entry["bytes_per_device"] == 4 * math.prod(entry["shape"])
    assert by_path["tower_0/text/query/kernel"][1:] == ["16", "x", "16", "float32", "(fsdp,", "-)", "256"]
    assert by_path["head/box/bias"][1:] == ["4", "float32", "copied", "16"]


def test_what_is_not_split_is_listed_with_its_reason(recipe, tmp_path, capsys):
    rules = "--config.sharding_rules=(('text_projection/kernel', ('fsdp',)), ('no_such_layer', ()))"
    report = report_of(recipe, tmp_path, "--mesh", "fsdp=3", rules)
    lost = {entry["path"]: entry["not_split"] for entry in report["parameters"] if entry["not_split"]}
    assert lost["head/text_projection/kernel"] == ["dimension 0 (16) is no multiple of fsdp=3"]
    assert report["unused_rules"] == ["no_such_layer"]
    printed = capsys.readouterr().out
    assert f"not split as their rule says: {len(lost)} parameters" in printed
    assert "head/text_projection/kernel: dimension 0 (16) is no multiple of fsdp=3 (rule text_proj" in printed
    assert "'no_such_layer' places no parameter" in printed


def test_mesh_of_the_recipe_and_the_number_of_devices(recipe, tmp_path):
    report = report_of(recipe, tmp_path, "--devices", "512", "--config.mesh.fsdp=4")
    assert report["mesh"] == {"replica": 1, "data": 128, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=-1,fsdp=4"], "give their number with --devices"),
        (["--mesh", "data:2"], "'data:2' is not AXIS=SIZE"),
        (["--mesh", "data=2,data=4"], "the axis data is there twice"),
        (["--mesh", "dat=2"], "did you mean data?"),
        (["--mesh", "data=3", "--devices", "8"], "multiply to 3, which are not the 8 devices"),
        (["--mesh", "data=2", "--devices", "0"], "--devices is 0"),
        (["--mesh", "data=2", "--config.sharding=zero3"], "there are ddp, fsdp, hsdp, fsdp_tp"),
    ],
)
def test_mistakes_are_one_line(recipe, arguments, message, capsys):
    assert main(["--config", recipe, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
