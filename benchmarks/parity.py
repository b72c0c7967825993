"""Compares this model with mmdetection's GLIP, stage by stage, from the same weights and inputs.

    python -m benchmarks.parity DIR [--seed N] [--dtype float32 float64 bfloat16] [--json FILE]

DIR holds keys.tsv and vectors.npz (see `benchmarks.reference`); the model's sizes, the number of its blocks, the image
and the batch follow from them. The checkpoint goes through the project's own importer. Prints a table of errors and
exits with 1 where one is above its bound. bfloat16 has no bounds: it tells how many of the best detections are lost,
which near ties decide where the weights are random.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.reference import Reference, ReferenceWeights, load_reference
from configs.medglip_t import get_config
from medglip_jax.detection.anchors import level_shapes, make_anchors
from medglip_jax.detection.assign import assign_anchors
from medglip_jax.detection.losses import detection_losses
from medglip_jax.detection.postprocess import detect
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import write_json
from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.interop import mmdet
from medglip_jax.interop.state_dict import from_state_dict
from medglip_jax.model.detector import GLIP

DTYPES = ("float32", "float64", "bfloat16")
# Largest error of a stage over the tensor's largest value. The reference is stored in float32, so that float64 cannot
# come closer than half a unit in its last place.
STAGE_BOUNDS = {"float32": 1e-4, "float64": 2e-7}
LOSS_BOUND = 1e-5  # relative
BOX_BOUND = 0.01  # pixels
SCORE_BOUND = 1e-4
BEST = 10  # detections of an image that bfloat16 should find again
BEST_IOU = 0.9

STAGES = ("swin_", "fpn_", "text_", "tower_", "cls_", "box_", "ctr_")  # how the names of intermediate results start

Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        dtype: compute type of the model.
        name: what is compared.
        error: how far it is from the reference.
        bound: most that is allowed, or None.
        unit: of both.
    """

    dtype: str
    name: str
    error: float
    bound: float | None
    unit: str

    @property
    def holds(self) -> bool:
        return self.bound is None or self.error <= self.bound  # false for a NaN


def model_config(reference: Reference) -> ConfigDict:
    """Returns the recipe of the reference's model, with its sizes, canvas and prompt length."""
    config = get_config()
    config.model = mmdet.infer_sizes(reference.shapes, config.model)
    config.data.canvas, config.data.max_tokens = tuple(reference.canvas), reference.num_tokens
    return config


def load_params(reference: Reference, config: ConfigDict, seed: int, dtype: str) -> Any:
    """Returns the reference's parameters, imported as any mmdetection checkpoint is.

    Raises:
        ValueError: not every parameter finds its place.
    """
    weights = ReferenceWeights(reference.shapes, seed, np.float64 if dtype == "float64" else np.float32)
    params, report = from_state_dict(
        weights,
        mmdet.parameter_names(config.model),
        flat_shapes(parameter_shapes(GLIP(config.model), config)),
        ignored=mmdet.is_ignored,
    )
    if not report.complete:
        raise ValueError(f"the reference's checkpoint is not one of this model: {report.describe()}")
    return params


def compute_stages(reference: Reference, params: Any, config: ConfigDict) -> tuple[Outputs, dict[str, np.ndarray]]:
    """Runs the model.

    Returns:
        The detector's outputs, and every intermediate result under its name in the vectors (maps channel-first).
    """
    vectors, model = reference.vectors, GLIP(config.model)
    forward = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, mutable=["intermediates"]))
    pixels = vectors["image"].transpose(0, 2, 3, 1)
    outputs, captured = forward(params, pixels, vectors["input_ids"], vectors["attention_mask"])
    outputs, captured = jax.tree.map(np.asarray, (outputs, captured["intermediates"]))

    hidden = captured["language_hidden"][0]
    stages = {"text_hidden": hidden, "text_embedded": hidden * vectors["attention_mask"][..., None]}
    levels = {"swin": captured["backbone_levels"][0], "fpn": captured["neck_levels"][0]}
    for block in range(config.model.tower.num_blocks):
        tower = captured[f"tower_{block}"]
        levels[f"tower_{3 * block:02d}_VLFuse_visual"] = tower["fusion_visual"][0]
        stages[f"tower_{3 * block:02d}_VLFuse_lang"] = tower["fusion_text"][0]
        stages[f"tower_{3 * block + 1:02d}_BertEncoderLayer_lang"] = tower["text_hidden"][0]
        levels[f"tower_{3 * block + 2:02d}_DyConv_visual"] = tower["dyconv_levels"][0]
    for name, maps in levels.items():
        stages |= {f"{name}_{i}": x.transpose(0, 3, 1, 2) for i, x in enumerate(maps)}
    for prefix, key in (("cls", "token_logits"), ("box", "box_deltas"), ("ctr", "centerness")):
        ends = np.cumsum([x.shape[1] * x.shape[2] for x in levels["fpn"]])[:-1]
        for i, (part, like) in enumerate(zip(np.split(outputs[key], ends, axis=1), levels["fpn"], strict=True)):
            maps = part.reshape(*like.shape[:3], -1).transpose(0, 3, 1, 2)
            stages[f"{prefix}_{i}"] = part if prefix == "cls" else maps
    return outputs, stages


def compare_stages(reference: Reference, stages: dict[str, np.ndarray], dtype: str) -> list[Row]:
    """Compares every intermediate result, each by its largest error over the tensor's largest value.

    Raises:
        ValueError: the reference has a stage that is not computed here.
    """
    stored = [name for name in reference.vectors if name.startswith(STAGES)]
    if unknown := sorted(set(stored) - stages.keys()):
        raise ValueError(f"the reference has stages that this model has not: {unknown}")
    rows = []
    for name in stored:
        expected, value = reference.vectors[name].astype(np.float64), stages[name].astype(np.float64)
        # Of the text only the first tokens are stored.
        value = value[tuple(slice(size) for size in expected.shape)]
        if value.shape != expected.shape:
            raise ValueError(f"{name} is {list(value.shape)} here and {list(expected.shape)} in the reference")
        error = np.abs(value - expected).max() / np.abs(expected).max()
        rows.append(Row(dtype, name, float(error), STAGE_BOUNDS.get(dtype), "of the largest value"))
    return rows


def stored_outputs(reference: Reference) -> Outputs:
    """Returns the head outputs as mmdetection computed them; the tokens that are not stored have logits of -50000."""
    vectors, num_tokens = reference.vectors, reference.num_tokens
    levels = range(sum(name.startswith("cls_") for name in vectors))

    def channels_last(prefix: str) -> np.ndarray:
        maps = [vectors[f"{prefix}_{i}"] for i in levels]
        return np.concatenate([x.reshape(*x.shape[:2], -1).swapaxes(1, 2) for x in maps], axis=1)

    logits = np.concatenate([vectors[f"cls_{i}"] for i in levels], axis=1)
    return {
        "token_logits": np.pad(logits, ((0, 0), (0, 0), (0, num_tokens - logits.shape[2])), constant_values=-50000.0),
        "box_deltas": channels_last("box"),
        "centerness": channels_last("ctr")[..., 0],
    }


def targets(reference: Reference) -> dict[str, np.ndarray]:
    """Returns the reference's boxes and phrases as a batch; padded to the image with the most."""
    vectors, images = reference.vectors, range(reference.batch_size)
    most = max(len(vectors[f"gt_boxes_{i}"]) for i in images)
    boxes = np.zeros((len(images), most, 4), np.float32)
    box_mask = np.zeros((len(images), most), bool)
    positive_map = np.zeros((len(images), most, reference.num_tokens), np.float32)
    for i in images:
        number = len(vectors[f"gt_boxes_{i}"])
        boxes[i, :number] = vectors[f"gt_boxes_{i}"] + [0, 0, 1, 1]  # the head was given inclusive corners
        box_mask[i, :number] = True
        positive_map[i, :number] = vectors[f"positive_map_{i}"]
    return {
        "image": np.zeros((len(images), *reference.canvas, 3), np.uint8),
        "attention_mask": vectors["attention_mask"],
        "boxes": boxes,
        "box_mask": box_mask,
        "positive_map": positive_map,
    }


def assign_plainly(anchors: np.ndarray, level_sizes: tuple[int, ...], boxes: np.ndarray, topk: int) -> np.ndarray:
    """ATSS as the paper (arXiv 1912.02424) writes it, box by box in float64.

    Args:
        anchors, boxes: float[N, 4], float[M, 4], half-open; overlaps are taken between inclusive corners.
        level_sizes: number of anchors of each level.
        topk: candidates of a box on each level.

    Returns:
        int[N]: the anchor's box, or -1.
    """
    anchors, boxes = anchors.astype(np.float64) - [0, 0, 1, 1], boxes.astype(np.float64) - [0, 0, 1, 1]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    best, assigned = np.full(len(anchors), -np.inf), np.full(len(anchors), -1)
    for number, box in enumerate(boxes):
        distances = np.linalg.norm(centers - (box[:2] + box[2:]) / 2, axis=1)
        candidates, start = [], 0
        for size in level_sizes:
            candidates += list(start + np.argsort(distances[start : start + size], kind="stable")[:topk])
            start += size
        low = np.maximum(anchors[candidates, :2], box[:2])
        high = np.minimum(anchors[candidates, 2:], box[2:])
        intersection = np.prod(np.maximum(high - low, 0), axis=1)
        areas = np.prod(anchors[candidates, 2:] - anchors[candidates, :2], axis=1)
        ious = intersection / (areas + np.prod(box[2:] - box[:2]) - intersection)
        threshold = ious.mean() + ious.std(ddof=1)
        for anchor, overlap in zip(candidates, ious, strict=True):
            x, y = centers[anchor]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best[anchor]:
                best[anchor], assigned[anchor] = overlap, number
    return assigned


def soft_token_loss(outputs: Outputs, batch: dict[str, np.ndarray], assigned: np.ndarray) -> float:
    """The focal loss of mmdetection's head when it is given the positive map as it is, rows that sum to 1.

    So the reference's loss_cls was computed. In training both mmdetection's detector and Microsoft's collator make the
    map binary before, as `detection_losses` does; this holds its assignment, text mask and divisor to the reference.
    """
    soft = np.take_along_axis(batch["positive_map"], np.maximum(assigned, 0)[..., None], axis=1)
    soft = soft * (assigned >= 0)[..., None]
    logits = outputs["token_logits"].astype(np.float64)
    p = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    weight = (0.25 * soft + 0.75 * (1 - soft)) * ((1 - p) * soft + p * (1 - soft)) ** 2
    losses = weight * (np.logaddexp(0, logits) - logits * soft)
    return float((losses * batch["attention_mask"][:, None]).sum() / max((assigned >= 0).sum(), 1))


def _relative_error(value: Any, expected: Any) -> float:
    value, expected = np.float64(value).item(), np.float64(expected).item()
    return abs(value - expected) / abs(expected)


def compare_losses(reference: Reference, config: ConfigDict, dtype: str) -> list[Row]:
    """Compares assignment and losses, from mmdetection's head outputs."""
    vectors, batch, detection = reference.vectors, targets(reference), config.detection
    outputs = {name: x.astype(dtype) for name, x in stored_outputs(reference).items()}
    anchors, sizes = make_anchors(*reference.canvas, detection.strides, detection.anchor_scale)
    shapes = level_shapes(*reference.canvas, detection.strides)
    assign = functools.partial(assign_anchors, jnp.asarray(anchors, dtype), shapes, topk=detection.atss_topk)
    boxes = jnp.asarray(batch["boxes"], dtype)
    assigned = np.asarray(jax.jit(jax.vmap(lambda b, m: assign(boxes=b, box_mask=m)))(boxes, batch["box_mask"]))
    plain = np.stack(
        [
            assign_plainly(anchors, sizes, some[mask], detection.atss_topk)
            for some, mask in zip(batch["boxes"], batch["box_mask"], strict=True)
        ]
    )
    losses = jax.jit(functools.partial(detection_losses, config=detection))(outputs, batch)
    binary = {**batch, "positive_map": (batch["positive_map"] > 0).astype(np.float64)}
    pairs = {
        "loss_cls (targets as stored)": (soft_token_loss(outputs, batch, assigned), vectors["loss_cls"]),
        "loss_cls (binary targets)": (losses["loss_token"], soft_token_loss(outputs, binary, assigned)),
        "loss_bbox": (losses["loss_box"], vectors["loss_bbox"]),
        "loss_centerness": (losses["loss_centerness"], vectors["loss_centerness"]),
    }
    return [
        Row(dtype, "ATSS assignment", float((assigned != plain).sum()), 0, "anchors differ"),
        *(
            Row(dtype, name, _relative_error(value, expected), LOSS_BOUND, "relative")
            for name, (value, expected) in pairs.items()
        ),
    ]


def find(reference: Reference, outputs: Outputs, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns what `detect` finds in the reference's images."""
    batch, canvas = targets(reference), reference.canvas
    sizes = np.tile(np.asarray(canvas, np.int32), (reference.batch_size, 1))
    run = jax.jit(functools.partial(detect, config=config.detection, canvas=canvas))
    return jax.tree.map(np.asarray, run(outputs, sizes, batch["positive_map"], batch["box_mask"]))


def compare_detections(
    reference: Reference, outputs: Outputs, config: ConfigDict, dtype: str, source: str
) -> list[Row]:
    """Compares the detections of every image, place by place: the same label, box and score."""
    found, vectors, rows = find(reference, outputs, config), reference.vectors, []
    for i in range(reference.batch_size):
        number = len(vectors[f"pred_labels_{i}"])
        labels = found["phrases"][i][:number] != vectors[f"pred_labels_{i}"]
        boxes = np.abs(found["boxes"][i][:number] - vectors[f"pred_boxes_{i}"])
        scores = np.abs(found["scores"][i][:number] - vectors[f"pred_scores_{i}"])
        extra = int((found["phrases"][i] >= 0).sum()) - number
        name = f"detections of image {i}, {source}"
        rows += [
            Row(dtype, f"{name}: order", float(labels.sum() + abs(extra)), 0, f"of {number} places differ"),
            Row(dtype, f"{name}: boxes", float(boxes.max()), BOX_BOUND, "pixels"),
            Row(dtype, f"{name}: scores", float(scores.max()), SCORE_BOUND, "absolute"),
        ]
    return rows


def compare_best(reference: Reference, outputs: Outputs, config: ConfigDict, dtype: str) -> list[Row]:
    """Counts how many of the reference's best detections are lost: none of the same label and about the same place."""
    found, vectors, rows = find(reference, outputs, config), reference.vectors, []
    for i in range(reference.batch_size):
        lost = 0
        best = zip(vectors[f"pred_boxes_{i}"][:BEST], vectors[f"pred_labels_{i}"][:BEST], strict=True)
        for box, label in best:
            same = found["boxes"][i][found["phrases"][i] == label].astype(np.float64)
            low, high = np.maximum(same[:, :2], box[:2]), np.minimum(same[:, 2:], box[2:])
            intersection = np.prod(np.maximum(high - low, 0), axis=1)
            union = np.prod(same[:, 2:] - same[:, :2], axis=1) + np.prod(box[2:] - box[:2]) - intersection
            lost += not (intersection > BEST_IOU * union).any()
        unit = f"of {BEST} lost at IoU {BEST_IOU}"
        rows.append(Row(dtype, f"best detections of image {i}", float(lost), None, unit))
    return rows


def compare(reference: Reference, seed: int, dtype: str) -> list[Row]:
    """Compares everything in one compute type: "float32", "float64" or "bfloat16"."""
    config = model_config(reference)
    config.model.dtype = dtype
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        params = load_params(reference, config, seed, dtype)
        outputs, stages = compute_stages(reference, params, config)
        rows = compare_stages(reference, stages, dtype)
        if dtype == "bfloat16":
            return rows + compare_best(reference, outputs, config, dtype)
        stored = {name: x.astype(dtype) for name, x in stored_outputs(reference).items()}
        return [
            *rows,
            *compare_losses(reference, config, dtype),
            *compare_detections(reference, stored, config, dtype, "its head outputs"),
            *compare_detections(reference, outputs, config, dtype, "from its pixels"),
        ]


def table(rows: list[Row]) -> Iterator[str]:
    """Yields the lines of a table for people."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        bound = "" if row.bound is None else f"  (at most {row.bound:g})"
        mark = "" if row.holds else "  TOO LARGE"
        yield f"{row.dtype:9} {row.name:{width}} {row.error:9.2e} {row.unit}{bound}{mark}"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if an error is above its bound."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description="Compares this model with mmdetection's GLIP."
    )
    add = parser.add_argument
    add("directory", type=pathlib.Path, metavar="DIR", help="folder of keys.tsv and vectors.npz")
    add("--seed", type=int, default=0, help="of the checkpoint's weights; default: %(default)s")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="compute types; default: all")
    add("--json", type=pathlib.Path, metavar="FILE", help="file to write the rows to")
    options = parser.parse_args(argv)

    reference = load_reference(options.directory)
    rows = []
    for dtype in options.dtype:
        rows += compare(reference, options.seed, dtype)
    for line in table(rows):
        print(line)
    if options.json:
        write_json([dataclasses.asdict(row) for row in rows], options.json)
    broken = [row for row in rows if not row.holds]
    print(f"{len(rows) - len(broken)} of {len(rows)} hold" + (f", {len(broken)} do not" if broken else ""))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
