"""The parameters of GLIP under Microsoft's names and layouts (maskrcnn-benchmark), and the yaml that builds it."""

from typing import Any

import yaml
from ml_collections import ConfigDict

from medglip_jax.interop import mmdet
from medglip_jax.interop.state_dict import Weight
from medglip_jax.model.pixels import PIXEL_MEAN, PIXEL_STD

# How names start in mmdetection and in Microsoft's code; the first that fits counts.
_STARTS = (
    ("backbone.patch_embed.projection.", "backbone.body.patch_embed.proj."),
    ("backbone.stages.", "backbone.body.layers."),
    ("backbone.", "backbone.body."),
    *((f"neck.lateral_convs.{i}.conv.", f"backbone.fpn.fpn_inner{i + 2}.") for i in range(3)),
    *((f"neck.fpn_convs.{i}.conv.", f"backbone.fpn.fpn_layer{i + 2}.") for i in range(3)),
    ("neck.fpn_convs.3.conv.", "backbone.fpn.top_blocks.p6."),
    ("neck.fpn_convs.4.conv.", "backbone.fpn.top_blocks.p7."),
    ("language_model.language_backbone.", "language_backbone."),
    ("bbox_head.", "rpn."),
)
# What is further in, in names that start with Microsoft's first word.
_PARTS = (
    ("backbone.", ".attn.w_msa.", ".attn."),
    ("backbone.", ".ffn.layers.0.0.", ".mlp.fc1."),
    ("backbone.", ".ffn.layers.1.", ".mlp.fc2."),
    ("rpn.", ".dyconvs.", ".DyConv."),
    ("rpn.", ".attnconv.", ".AttnConv."),
)
# What mmdetection stores in another layout, by a part of its name.
_LAYOUTS = {
    ".downsample.norm.": "patch merging norm",
    ".downsample.reduction.": "patch merging linear",
    ".scales.": "scalar as vector",
}
_IGNORED = {"cls_logits", "anchor_generator", "resizer", "pooler", "relative_position_index", "position_ids"}

LANGUAGE = "language_backbone.body.model"  # the text encoder, with Hugging Face's names under it
# The only BERT that Microsoft's code asks for, tokenizer included. It takes a folder of this name in the current
# directory for it, of any size but the width.
BERT = "bert-base-uncased"

# What Microsoft's code does not read from its configuration: modeling/rpn/vldyhead.py, layers/dyrelu.py and
# language_backbone/bert_model.py.
_FIXED = {
    "bert.hidden_size": 768,
    "tower.fusion_dim": 2048,
    "tower.fusion_heads": 8,
    "tower.fusion_dropout": 0.1,
    "tower.legacy_offsets": True,
}
_HEADER = f"""# A GLIP that medglip_jax trained, for Microsoft's code. Run it in this folder: the code asks for {BERT}
# by name, and takes the folder of that name in the current directory for it.
#
#     cfg.merge_from_file("glip_config.yaml")
#     cfg.merge_from_list(["MODEL.WEIGHT", "model.pth"])
#     demo = GLIPDemo(cfg, min_image_size=cfg.INPUT.MIN_SIZE_TEST)
#     demo.compute_prediction(bgr, "left lung. nodule", [{{"span": "left lung"}}, {{"span": "nodule"}}])
#
# Boxes are x0 y0 x1 y1 of the first and the last pixel; label 1 is the first phrase.
"""


def parameter_names(config: ConfigDict) -> list[Weight]:
    """Returns every parameter of the model with its name in Microsoft's GLIP and how the array changes between them.

    Args:
        config: `config.model`.
    """
    return [
        Weight(ours, from_mmdet(theirs), next((kind for part, kind in _LAYOUTS.items() if part in theirs), layout))
        for ours, theirs, layout in mmdet.parameter_names(config)
    ]


def from_mmdet(name: str) -> str:
    """Returns Microsoft's name of what mmdetection calls `name`."""
    start, other = next(((start, other) for start, other in _STARTS if name.startswith(start)), ("", ""))
    name = other + name.removeprefix(start)
    for word, part, other in _PARTS:
        name = name.replace(part, other) if name.startswith(word) else name
    return name


def to_mmdet(name: str) -> str:
    """Returns mmdetection's name of what Microsoft calls `name`, the inverse of `from_mmdet`."""
    for word, other, part in _PARTS:
        name = name.replace(part, other) if name.startswith(word) else name
    start, other = next(((start, other) for other, start in _STARTS if name.startswith(start)), ("", ""))
    return other + name.removeprefix(start)


def is_ignored(name: str) -> bool:
    """Tells what a Microsoft checkpoint holds and GLIP does not use: buffers, and layers without a part in grounding.

    `rpn.tunable_linear`, which prompt tuning adds to the text features, is not among them.
    """
    return not _IGNORED.isdisjoint(name.split("."))


def config_yaml(recipe: ConfigDict) -> str:
    """Returns the configuration with which Microsoft's code builds the model and detects as the recipe does.

    It has no MODEL.WEIGHT and no data sets; the commands take the weights as `--weight FILE`. They must find the text
    encoder and the tokenizer as the folder `BERT` in the current directory.

    Args:
        recipe: reads `model`, `detection` and `data`.

    Raises:
        ValueError: names the fields of the recipe that Microsoft's code has another, fixed value for.
    """
    model, detection, data = recipe.model, recipe.detection, recipe.data
    wrong = []
    for field, fixed in _FIXED.items():
        group, name = field.split(".")
        if model[group][name] != fixed:
            wrong.append(f"  config.model.{field} is {model[group][name]}, not {fixed}")
    if wrong:
        raise ValueError("Microsoft's GLIP cannot run this model, its code fixes what\n" + "\n".join(wrong))

    swin, channels = model.swin, model.fpn.channels
    clamps = (
        "CLAMP_MIN_FOR_UNDERFLOW",
        "CLAMP_MAX_FOR_OVERFLOW",
        "CLAMP_BERTATTN_MIN_FOR_UNDERFLOW",
        "CLAMP_BERTATTN_MAX_FOR_OVERFLOW",
        "CLAMP_DOT_PRODUCT",
    )
    fields: dict[str, Any] = {
        "MODEL": {
            "META_ARCHITECTURE": "GeneralizedVLRCNN",
            "RPN_ONLY": True,
            "RPN_ARCHITECTURE": "VLDYHEAD",
            "BACKBONE": {
                "CONV_BODY": "SWINT-FPN-RETINANET",
                "OUT_CHANNELS": channels,
                "FREEZE_CONV_BODY_AT": -1,
            },
            "SWINT": {
                "EMBED_DIM": swin.embed_dim,
                "DEPTHS": list(swin.depths),
                "NUM_HEADS": list(swin.num_heads),
                "WINDOW_SIZE": swin.window,
                "OUT_CHANNELS": [swin.embed_dim << stage for stage in range(len(swin.depths))],
                "MLP_RATIO": swin.mlp_ratio,
                "DROP_PATH_RATE": swin.drop_path,
            },
            "FPN": {"DROP_BLOCK": model.fpn.drop_block > 0, "DROP_PROB": model.fpn.drop_block},
            "GROUP_NORM": {"NUM_GROUPS": model.tower.norm_groups},
            "LANGUAGE_BACKBONE": {
                "MODEL_TYPE": BERT,
                "TOKENIZER_TYPE": BERT,
                "LANG_DIM": model.bert.hidden_size,
                "MAX_QUERY_LEN": data.max_tokens,
                "MASK_SPECIAL": False,
            },
            "RPN": {
                "USE_FPN": True,
                "ANCHOR_SIZES": [stride * detection.anchor_scale for stride in detection.strides],
                "ANCHOR_STRIDE": list(detection.strides),
                "ASPECT_RATIOS": [1.0],
                "SCALES_PER_OCTAVE": 1,
            },
            "DYHEAD": {
                "CHANNELS": channels,
                "NUM_CONVS": model.tower.num_blocks,
                "NUM_CLASSES": data.max_tokens + 1,  # more than the phrases of a prompt; 81 would be its default
                "USE_GN": True,
                "USE_DYRELU": True,
                "USE_DFCONV": True,
                "USE_DYFUSE": True,
                "TOPK": detection.atss_topk,
                "PRIOR_PROB": model.prior_probability,
                "SCORE_AGG": "MEAN",
                "LOG_SCALE": 0.0,
                "FUSE_CONFIG": {
                    "EARLY_FUSE_ON": True,
                    "TYPE": "MHA-B",
                    "JOINT_EMB_SIZE": channels,
                    "USE_DOT_PRODUCT_TOKEN_LOSS": True,
                    "USE_FUSED_FEATURES_DOT_PRODUCT": True,
                    "USE_LAYER_SCALE": True,
                    **dict.fromkeys(clamps, True),
                },
            },
            "ATSS": {
                "INFERENCE_TH": detection.score_threshold,
                "NMS_TH": detection.nms_iou,
                "PRE_NMS_TOP_N": detection.pre_nms,
                "DETECTIONS_PER_IMG": detection.max_detections,
            },
        },
        "DATASETS": {"SEPARATION_TOKENS": ". "},
        "INPUT": {
            "PIXEL_MEAN": list(PIXEL_MEAN),
            "PIXEL_STD": list(PIXEL_STD),
            "MIN_SIZE_TEST": min(data.canvas),
            "MAX_SIZE_TEST": max(data.canvas),
        },
        "DATALOADER": {"SIZE_DIVISIBILITY": 32},
    }
    return _HEADER + yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=120)
