import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import traverse_util

from configs import medglip_l, medglip_t
from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.interop import glip, mmdet
from medglip_jax.interop.reading import strip_prefix
from medglip_jax.interop.state_dict import LAYOUTS, from_state_dict, to_state_dict
from medglip_jax.model.detector import GLIP
from medglip_jax.model.swin import PatchMerging


@pytest.fixture(scope="module")
def shapes(tiny_config):
    return flat_shapes(parameter_shapes(GLIP(tiny_config.model), tiny_config))


@pytest.fixture(scope="module")
def params(shapes):
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def find(state_dict, config, shapes):
    return from_state_dict(state_dict, glip.parameter_names(config.model), shapes, ignored=glip.is_ignored)


def read_table(shared_dir, variant):
    with (shared_dir / "reference" / f"microsoft_to_mmdet_glip_{variant}.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(("variant", "recipe"), [("t", medglip_t), ("l", medglip_l)])
def test_names_and_shapes_are_those_of_microsofts_models(shared_dir, variant, recipe):
    config = recipe.get_config()
    config.data.canvas, config.data.max_tokens = (64, 64), 8  # parameters do not depend on them
    shapes = flat_shapes(parameter_shapes(GLIP(config.model), config))
    rows = [row for row in read_table(shared_dir, variant) if not glip.is_ignored(row["microsoft_name"])]

    weights = glip.parameter_names(config.model)
    found = {w.theirs: LAYOUTS[w.layout][0](np.broadcast_to(np.float32(0), shapes[w.ours])).shape for w in weights}
    wanted = {row["microsoft_name"]: tuple(map(int, row["microsoft_shape"].split("x"))) for row in rows}
    assert found == wanted


@pytest.mark.parametrize(("variant", "recipe"), [("t", medglip_t), ("l", medglip_l)])
def test_names_pair_with_mmdetections(shared_dir, variant, recipe):
    rows = [row for row in read_table(shared_dir, variant) if not glip.is_ignored(row["microsoft_name"])]
    pairs = {(row["microsoft_name"], row["mmdet_name"]) for row in rows}
    model = recipe.get_config().model
    in_mmdet = {weight.ours: weight.theirs for weight in mmdet.parameter_names(model)}
    assert {(weight.theirs, in_mmdet[weight.ours]) for weight in glip.parameter_names(model)} == pairs
    assert {(glip.from_mmdet(theirs), glip.to_mmdet(microsofts)) for microsofts, theirs in pairs} == pairs


@pytest.mark.parametrize("variant", ["t", "l"])
def test_what_is_ignored_is_what_has_no_part_in_the_model(shared_dir, variant):
    ignored = {
        row["microsoft_name"] for row in read_table(shared_dir, variant) if glip.is_ignored(row["microsoft_name"])
    }
    kinds = {re.sub(r"\d+", "N", name) for name in ignored}
    assert kinds == {
        "backbone.body.layers.N.blocks.N.attn.relative_position_index",
        "rpn.head.cls_logits.weight",
        "rpn.head.cls_logits.bias",
        "rpn.anchor_generator.cell_anchors.N",
    }
    assert glip.is_ignored("language_backbone.body.model.embeddings.position_ids")
    assert not glip.is_ignored("rpn.tunable_linear.weight")


def test_parameters_come_back_bit_by_bit(tiny_config, shapes, params):
    state_dict = dict(to_state_dict(params, glip.parameter_names(tiny_config.model)))
    state_dict |= {"rpn.head.cls_logits.bias": np.zeros(80), "rpn.anchor_generator.cell_anchors.0": np.zeros((1, 4))}
    back, report = find(strip_prefix({f"module.{name}": x for name, x in state_dict.items()}), tiny_config, shapes)
    assert report.complete and len(report.ignored) == 2
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_scales_are_vectors_of_one_element(tiny_config, params):
    state_dict = dict(to_state_dict(params, glip.parameter_names(tiny_config.model)))
    assert state_dict["rpn.head.scales.0.scale"].shape == (1,)


def test_patch_merging_in_microsofts_order_computes_the_same():
    """The four neighbours one after the other, as in maskrcnn_benchmark/modeling/backbone/swint.py."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 8, 3)).astype(np.float32)
    module = PatchMerging(jnp.float32)
    params = {
        "norm": {"scale": rng.standard_normal(12), "bias": rng.standard_normal(12)},
        "reduction": {"kernel": rng.standard_normal((12, 6))},
    }
    params = jax.tree.map(np.float32, params)

    scale, bias = (LAYOUTS["patch merging norm"][0](params["norm"][name]) for name in ("scale", "bias"))
    weight = LAYOUTS["patch merging linear"][0](params["reduction"]["kernel"])
    merged = np.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    normal = (merged - merged.mean(-1, keepdims=True)) / np.sqrt(merged.var(-1, keepdims=True) + 1e-5)
    wanted = (normal * scale + bias) @ weight.T

    np.testing.assert_allclose(module.apply({"params": params}, x), wanted, atol=1e-5)


def test_another_architecture_is_reported(tiny_config, shapes, params):
    state_dict = dict(to_state_dict(params, glip.parameter_names(tiny_config.model)))
    state_dict["backbone.body.norm1.weight"] = np.zeros(3)
    state_dict["rpn.tunable_linear.weight"] = np.zeros((1000, 16))
    del state_dict["rpn.head.bias0"]
    back, report = find(state_dict, tiny_config, shapes)
    assert report.missing == ("rpn.head.bias0",)
    assert report.unexpected == ("rpn.tunable_linear.weight",)
    assert report.misshapen == (("backbone.body.norm1.weight", (3,), (16,)),)
    assert "bias0" not in back["head"] and "scale" not in back["backbone"]["norm_1"]


def test_the_model_without_fusion_is_reported(shared_dir, tiny_config, shapes, params):
    """GLIP-T (A): its tower is dynamic convolutions only, numbered 0, 1, 2 ... instead of 2, 5, 8 ..."""

    def without_fusion(names):
        found = ((name, re.search(r"dyhead_tower\.(\d+)\.", name)) for name in names)
        kept = ((name, int(match[1]) if match else 2) for name, match in found)
        return {n: re.sub(r"(tower\.)\d+", rf"\g<1>{place // 3}", n) for n, place in kept if place % 3 == 2}

    names = [weight.theirs for weight in glip.parameter_names(medglip_t.get_config().model)]
    in_table = {row["microsoft_name"] for row in read_table(shared_dir, "a")}
    assert set(without_fusion(names).values()) == {name for name in in_table if not glip.is_ignored(name)}

    state_dict = dict(to_state_dict(params, glip.parameter_names(tiny_config.model)))
    renamed = {theirs: state_dict[ours] for ours, theirs in without_fusion(state_dict).items()}
    _, report = find(renamed, tiny_config, shapes)
    assert {name for name in report.unexpected} == {
        name for name in renamed if "tower.0.DyConv" in name or re.search(r"tower\.0\.(AttnConv|offset|relu)", name)
    }
    assert len(report.missing) == len(state_dict) - len(renamed) + len(report.unexpected)
    assert "rpn.head.dyhead_tower.0.b_attn.gamma_v" in report.missing


def test_the_yaml_has_the_sizes_of_the_model():
    fields = yaml.safe_load(glip.config_yaml(medglip_l.get_config()))["MODEL"]
    assert fields["SWINT"] == {  # configs/pretrain/glip_Swin_L.yaml
        "EMBED_DIM": 192,
        "DEPTHS": [2, 2, 18, 2],
        "NUM_HEADS": [6, 12, 24, 48],
        "WINDOW_SIZE": 12,
        "OUT_CHANNELS": [192, 384, 768, 1536],
        "MLP_RATIO": 4,
        "DROP_PATH_RATE": 0.4,
    }
    assert fields["DYHEAD"]["NUM_CONVS"] == 8
    assert fields["RPN"]["ANCHOR_SIZES"] == [64, 128, 256, 512, 1024]
    assert fields["LANGUAGE_BACKBONE"]["TOKENIZER_TYPE"] == glip.BERT


def test_channels_and_groups_can_change_in_microsofts_code():
    config = medglip_t.get_config()
    config.model.fpn.channels, config.model.tower.norm_groups = 128, 8
    fields = yaml.safe_load(glip.config_yaml(config))["MODEL"]
    assert fields["BACKBONE"]["OUT_CHANNELS"] == fields["DYHEAD"]["CHANNELS"] == 128
    assert fields["DYHEAD"]["FUSE_CONFIG"]["JOINT_EMB_SIZE"] == 128
    assert fields["GROUP_NORM"]["NUM_GROUPS"] == 8


def test_fields_that_microsofts_code_fixes_are_named():
    config = medglip_t.get_config()
    config.model.bert.vocab_size, config.model.bert.hidden_size, config.model.tower.fusion_dim = 4096, 384, 1024
    config.model.tower.legacy_offsets = False
    with pytest.raises(ValueError) as error:
        glip.config_yaml(config)
    assert re.findall(r"config\.model\.(\S+) is (\S+), not (\S+)", str(error.value)) == [
        ("bert.hidden_size", "384", "768"),
        ("tower.fusion_dim", "1024", "2048"),
        ("tower.legacy_offsets", "False", "True"),
    ]
