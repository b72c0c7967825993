"""Paths to shardings, on eight CPU devices."""

import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.parallel.presets import PRESETS
from medglip_jax.parallel.rules import find_placements, follow_parameters, match_rules

RULES = ((r"query/kernel", ("fsdp", "tensor")), (r"kernel$", (None, ("fsdp", "tensor"))), (r".*", ()))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_first_pattern_found_anywhere_in_the_path_wins(mesh, caplog):
    tree = {"a": {"query": {"kernel": shape(4, 6)}, "out": {"kernel": shape(3, 8), "bias": shape(8)}}}
    assert match_rules(RULES, tree, mesh) == {
        "a": {"query": {"kernel": P("fsdp", "tensor")}, "out": {"kernel": P(None, ("fsdp", "tensor")), "bias": P()}}
    }
    assert not caplog.records


def test_what_does_not_fit_is_left_out_and_reported_once(mesh, caplog):
    tree = {"odd": {"query": {"kernel": shape(3, 6)}}, "flat": {"query": {"kernel": shape(4)}}, "b": shape(2)}
    with caplog.at_level(logging.WARNING):
        specs = match_rules(RULES, tree, mesh)
    assert specs == {
        "odd": {"query": {"kernel": P(None, "tensor")}},
        "flat": {"query": {"kernel": P("fsdp")}},
        "b": P(),
    }
    (record,) = caplog.records
    assert "odd/query/kernel (3, 6): dimension 0 (3)" in record.getMessage()
    assert "flat/query/kernel (4,): no dimension 1" in record.getMessage()


def test_axis_of_size_one_splits_nothing_and_says_nothing(caplog):
    whole = make_mesh({"data": 8})
    assert match_rules(RULES, {"query": {"kernel": shape(3)}}, whole) == {"query": {"kernel": P()}}
    assert not caplog.records


def test_parameters_without_a_rule_are_all_named(mesh):
    with pytest.raises(ValueError, match=r"no pattern matches a/bias \(2,\)\n  c \(\)") as error:
        match_rules(RULES[:2], {"a": {"bias": shape(2), "kernel": shape(2, 4)}, "c": shape()}, mesh)
    assert "kernel" not in str(error.value)


def test_mistakes_in_a_rule_are_named(mesh):
    tree = {"a": {"bias": shape(2)}}
    with pytest.raises(ValueError, match=r"a/bias over 'model'.*replica, data, fsdp"):
        match_rules(((".*", ("model",)),), tree, mesh)
    with pytest.raises(ValueError, match=r"'\(bias' is no regular expression"):
        match_rules((("(bias", ()),), tree, mesh)
    with pytest.raises(ValueError, match="'bias' names the mesh axis 'fsdp' twice"):
        match_rules((("bias", ("fsdp", ("data", "fsdp"))),), tree, mesh)


def test_a_placement_tells_its_rule_and_what_is_lost(mesh):
    found = find_placements(RULES, {"query": {"kernel": shape(3, 6)}, "b": shape(2)}, mesh)
    assert list(found) == ["b", "query/kernel"] and found["b"].pattern == ".*" and not found["b"].lost
    assert found["query/kernel"].lost == ("dimension 0 (3) is no multiple of fsdp=2",)


def test_moments_lie_with_their_parameters_even_behind_a_mask(caplog):
    params = {"a": {"kernel": shape(4, 4)}, "b": {"kernel": shape(4, 4)}, "kernel": shape(4, 4)}
    specs = {"a": {"kernel": P("fsdp")}, "b": {"kernel": P("tensor")}, "kernel": P()}
    mask = {"a": {"kernel": True}, "b": {"kernel": True}, "kernel": False}
    optimizer = optax.chain(optax.masked(optax.scale_by_adam(), mask), optax.scale_by_schedule(lambda step: 1.0))
    followed = follow_parameters(jax.eval_shape(optimizer.init, params), params, specs)
    adam = followed[0].inner_state
    assert adam.mu["a"] == adam.nu["a"] == {"kernel": P("fsdp")} and adam.nu["b"] == {"kernel": P("tensor")}
    assert adam.count == followed[1].count == P()
    assert not caplog.records
    stranger = {"row": shape(4)}
    assert follow_parameters(stranger, params, specs) == {"row": P()}
    assert "row (4,)" in caplog.text


def test_what_comes_out_of_heads_and_hidden_layers_is_split_the_other_way_round(mesh):
    block = {name: {"kernel": shape(4, 8)} for name in ("v_proj", "values_l_proj", "out_v_proj", "out_l_proj")}
    specs = match_rules(PRESETS["fsdp_tp"], {"tower_0": {"fusion": block}}, mesh)["tower_0"]["fusion"]
    inward, outward = P("fsdp", "tensor"), P("tensor", "fsdp")
    assert {name: spec["kernel"] for name, spec in specs.items()} == {
        "v_proj": inward,
        "values_l_proj": inward,
        "out_v_proj": outward,
        "out_l_proj": outward,
    }
