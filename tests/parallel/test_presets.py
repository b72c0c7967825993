"""Where the parameters of the full-size models lie by each preset; shapes only, no device."""

import math
import re

import jax
import pytest

from medglip_jax.configuration import load_config
from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import abstract_mesh
from medglip_jax.parallel.presets import PRESETS, resolve_rules
from medglip_jax.parallel.rules import find_placements, path_name

LARGE = 20_000  # numbers; what is copied has fewer


@pytest.fixture(scope="module", params=["medglip_t", "medglip_l"])
def shapes(request):
    config = load_config(request.param)
    return parameter_shapes(GLIP(config.model), config)


def sizes_of(shapes):
    return {path_name(path): math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(shapes)}


def split_over(place):
    return {axis for entry in place.spec for axis in ([entry] if isinstance(entry, str) else entry or ())}


@pytest.mark.parametrize(
    ("preset", "mesh", "axes"),
    [
        ("fsdp", {"replica": 2, "data": 2, "fsdp": 8}, {"replica", "fsdp"}),
        ("hsdp", {"replica": 2, "data": 2, "fsdp": 8}, {"fsdp"}),
        ("fsdp_tp", {"replica": 2, "data": 2, "fsdp": 8}, {"replica", "fsdp"}),
        ("fsdp_tp", {"fsdp": 4, "sequence": 2, "tensor": 2}, {"fsdp"}),
    ],
)
def test_everything_large_is_split_and_everything_fits(shapes, preset, mesh, axes):
    found = find_placements(PRESETS[preset], shapes, abstract_mesh(mesh, math.prod(mesh.values())))
    sizes = sizes_of(shapes)
    assert found.keys() == sizes.keys()
    assert not [name for name, place in found.items() if place.lost]
    for name, place in found.items():
        if split_over(place):
            assert axes <= split_over(place) <= axes | {"tensor"}, name
        else:
            assert sizes[name] < LARGE or name.endswith("relative_position_bias_table"), name
    copied = sum(sizes[name] for name, place in found.items() if not split_over(place))
    assert copied < 0.005 * sum(sizes.values())


def test_ddp_copies_everything(shapes):
    found = find_placements(PRESETS["ddp"], shapes, abstract_mesh({"data": 2, "fsdp": 2, "tensor": 2}, 8))
    assert not any(split_over(place) for place in found.values())


def test_only_heads_and_hidden_widths_are_split_over_tensor(shapes):
    found = find_placements(PRESETS["fsdp_tp"], shapes, abstract_mesh({"fsdp": 4, "tensor": 2}, 8))
    split = {re.sub(r"\d+", "#", name) for name, place in found.items() if "tensor" in split_over(place)}
    layers = ("attention_output", "intermediate", "key", "output", "query", "value")
    assert split == {
        *(f"backbone/stage_#_block_#/{name}/kernel" for name in ("attention/qkv", "attention/proj", "fc#")),
        *(f"language/layer_#/{name}/kernel" for name in layers),
        *(f"tower_#/text/{name}/kernel" for name in layers),
        *(f"tower_#/fusion/{name}/kernel" for name in ("v_proj", "l_proj", "values_v_proj", "values_l_proj")),
        *(f"tower_#/fusion/{name}/kernel" for name in ("out_v_proj", "out_l_proj")),
    }


def test_no_rule_of_a_preset_is_idle(shapes):
    for name, rules in PRESETS.items():
        found = find_placements(rules, shapes, abstract_mesh({"fsdp": 8}, 8))
        assert {place.pattern for place in found.values()} == {pattern for pattern, _ in rules}, name


def test_parameters_that_no_preset_knows_are_an_error(shapes):
    strange = {**shapes, "adapter": {"matrix": jax.ShapeDtypeStruct((8, 8), "float32")}}
    for name in ("fsdp", "hsdp", "fsdp_tp"):
        with pytest.raises(ValueError, match=r"no pattern matches adapter/matrix \(8, 8\)"):
            find_placements(PRESETS[name], strange, abstract_mesh({"fsdp": 8}, 8))


def test_what_does_not_divide_is_reported(shapes):
    """96 or 192 channels of the first stage do not divide by 128."""
    found = find_placements(PRESETS["fsdp"], shapes, abstract_mesh({"fsdp": 128}, 128))
    lost = {name: place.lost for name, place in found.items() if place.lost}
    assert re.match(r"dimension 0 \(\d+\) is no multiple of fsdp=128", lost["backbone/stage_0_block_0/fc1/kernel"][0])
    assert all(name.startswith(("backbone/stage_", "neck/lateral_")) for name in lost)


def test_own_rules_go_before_those_of_the_preset(shapes):
    config = load_config(
        "medglip_t", ["--config.sharding=fsdp", "--config.sharding_rules=(('text_projection/kernel', (None, 'data')),)"]
    )
    found = find_placements(resolve_rules(config), shapes, abstract_mesh({"data": 2, "fsdp": 4}, 8))
    assert tuple(found["head/text_projection/kernel"].spec) == (None, "data")
    assert tuple(found["tower_0/text/query/kernel"].spec) == ("fsdp",)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'fsdptp': did you mean fsdp_tp"):
        resolve_rules(load_config("medglip_t", ["--config.sharding=fsdptp"]))


def test_recipe_of_an_older_run_keeps_its_rules(tmp_path):
    """Version 0.1.0 had neither presets nor the axes replica and sequence; its rules ended with one for everything."""
    (tmp_path / "config.json").write_text(
        '{"mesh": {"data": 2, "fsdp": 4, "tensor": 1}, "sharding_rules": [["query/kernel", ["fsdp", "tensor"]], '
        '[".*", []]]}'
    )
    config = load_config(tmp_path)
    assert config.mesh.to_dict() == {"replica": 1, "data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert resolve_rules(config)[:2] == (("query/kernel", ("fsdp", "tensor")), (".*", ()))
