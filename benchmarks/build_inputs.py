"""Inputs of the benchmark of builds: folders of images, masks and volumes, made of phantoms with noise.

voc, coco   colour JPEGs of 512 to 1024 pixels, with boxes, or boxes and run lengths
masks       grey PNGs of 512 to 1024 pixels, with a PNG file for each mask
nifti       compressed volumes of 256 x 256 x 64 voxels, with a label map
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import cv2
import nibabel
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.images import list_images
from data_pipelines.sources.phantoms import phantom

DRAWN = 256  # pixels, side of a phantom before it is enlarged; larger ones take most of the time to draw
SIZES = (512, 640, 768, 896, 1024)  # pixels, sides of the images, in turn
NOISE = {"voc": 9.0, "coco": 9.0, "masks": 3.0, "nifti": 12.0}  # standard deviation: grey values, or Hounsfield units
SHIFTS = 64  # pixels
MASKS = 5  # files of an image, at most
QUALITY = 88  # of the JPEGs: with that noise 120 to 420 kB
PHOTOGRAPHS = {"voc": ("microscopy",), "coco": ("endoscopy", "fundus", "dermoscopy")}
VOLUME = (64, 256, 256)  # voxels
VOXEL_MM = (3.0, 1.5, 1.5)
DATA_SETS = {
    "voc": {"source": "voc", "modality": "microscopy"},
    "coco": {"source": "coco", "modality": "endoscopy"},
    "masks": {"source": "masks", "modality": "xray"},
    "nifti": {"source": "nifti", "modality": "ct"},
}
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"

Region = tuple[str, np.ndarray]  # label, uint8[H, W]


@functools.cache
def draw_noise() -> np.ndarray:
    """Returns float32[H, W, 3] normal noise, larger than the images, so that each can take another piece of it."""
    return np.random.default_rng(0).standard_normal((max(SIZES) + SHIFTS, max(SIZES) + SHIFTS, 3), np.float32)


def draw(kind: str, modality: str, index: int) -> tuple[np.ndarray, list[Region]]:
    """Returns an enlarged phantom with noise, uint8[H, W] or uint8[H, W, 3], and its regions."""
    size = SIZES[index % len(SIZES)]
    example = phantom(index, size=DRAWN, modality=modality)
    pixels = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)
    left, top = index % SHIFTS, index // SHIFTS % SHIFTS
    noise = draw_noise()[top : top + size, left : left + size]
    noisy = pixels + NOISE[kind] * (noise if pixels.ndim == 3 else noise[..., 0])
    regions = []
    for region in example.regions:
        mask = coco_mask.decode(region.mask)  # pyright: ignore[reportArgumentType]
        regions.append((region.label, cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), regions


def make_voc(folder: pathlib.Path, index: int) -> None:
    pixels, regions = draw("voc", PHOTOGRAPHS["voc"][0], index)
    boxes = [(label, cv2.boundingRect(mask)) for label, mask in regions]
    objects = "".join(OBJECT.format(label, x + 1, y + 1, x + w, y + h) for label, (x, y, w, h) in boxes)
    (folder / "Annotations" / f"{index:06d}.xml").write_text(f"<annotation>{objects}</annotation>")
    save_jpeg(folder / "JPEGImages" / f"{index:06d}.jpg", pixels)


def make_coco(folder: pathlib.Path, index: int) -> dict[str, Any]:
    """Returns the image's part of the JSON file."""
    modalities = PHOTOGRAPHS["coco"]
    pixels, regions = draw("coco", modalities[index % len(modalities)], index)
    name = f"{index:06d}.jpg"
    save_jpeg(folder / "images" / name, pixels)
    annotations = []
    for label, mask in regions:
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        polygons = [cv2.approxPolyDP(outline, 1.0, True).ravel().tolist() for outline in outlines]
        polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        annotations.append(
            {"image_id": index, "label": label, "bbox": cv2.boundingRect(mask), "segmentation": polygons}
        )
    size = {"height": pixels.shape[0], "width": pixels.shape[1]}
    return {"image": {"id": index, "file_name": name, **size}, "annotations": annotations}


def make_masks(folder: pathlib.Path, index: int) -> None:
    pixels, regions = draw("masks", "xray", index)
    stem = f"{index:06d}_X-Ray_chest"
    cv2.imwrite(str(folder / "images" / f"{stem}.png"), pixels)
    merged: dict[str, np.ndarray] = {}
    for label, mask in regions:
        merged[label] = merged.get(label, 0) | mask
    for label, mask in list(merged.items())[:MASKS]:
        Image.fromarray(255 * mask).save(folder / "masks" / f"{stem}_{label.replace('_', '+')}.png")


def make_volume(folder: pathlib.Path, index: int) -> None:
    """Stacks one phantom of an abdomen, which grows, shrinks and moves from slice to slice."""
    rng = np.random.default_rng(index)
    example = phantom(index, size=VOLUME[1], modality="ct")
    pixels = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    labels, names = np.zeros(VOLUME[1:], np.uint8), {}
    for region in example.regions:
        value = names.setdefault(region.label, len(names) + 1)
        labels[coco_mask.decode(region.mask) > 0] = value  # pyright: ignore[reportArgumentType]
    values, layer = np.zeros(VOLUME, np.float32), np.zeros(VOLUME, np.uint8)
    for place, height in enumerate(np.linspace(-1, 1, VOLUME[0])):
        zoom, shift = 1 - 0.35 * height**2, 12 * height
        matrix = cv2.getRotationMatrix2D((VOLUME[2] / 2, VOLUME[1] / 2), 8 * height, zoom)
        matrix[:, 2] += shift
        values[place] = cv2.warpAffine(pixels, matrix, VOLUME[:0:-1]).astype(np.float32) * (400 / 255) - 150
        layer[place] = cv2.warpAffine(labels, matrix, VOLUME[:0:-1], flags=cv2.INTER_NEAREST)
    values += rng.normal(0, NOISE["nifti"], VOLUME)
    case = folder / f"case{index:04d}"
    case.mkdir()
    affine = np.diag([-VOXEL_MM[2], -VOXEL_MM[1], -VOXEL_MM[0], 1.0])  # stored right to left, front to back, down
    for name, array in (("ct", np.rint(values).astype(np.int16)), ("multilabel", layer)):
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), case / f"{name}.nii.gz")
    (case / "labels.json").write_text(json.dumps(names))


def save_jpeg(path: pathlib.Path, pixels: np.ndarray) -> None:
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


MAKERS: dict[str, tuple[Callable[[pathlib.Path, int], Any], tuple[str, ...]]] = {
    "voc": (make_voc, ("JPEGImages", "Annotations")),
    "coco": (make_coco, ("images",)),
    "masks": (make_masks, ("images", "masks")),
    "nifti": (make_volume, ()),
}


def make_inputs(root: pathlib.Path, kind: str, count: int, pool: concurrent.futures.Executor) -> None:
    """Makes the folder of a data set with so many images, or volumes."""
    maker, folders = MAKERS[kind]
    for folder in (root / kind, *(root / kind / name for name in folders)):
        folder.mkdir(parents=True)
    made = list(pool.map(maker, [root / kind] * count, range(count), chunksize=4))
    if kind == "coco":
        annotations = [each for entry in made for each in entry["annotations"]]
        categories = sorted({each["label"] for each in annotations})
        for number, each in enumerate(annotations):
            each |= {"id": number, "category_id": categories.index(each.pop("label"))}
        content = {
            "images": [entry["image"] for entry in made],
            "annotations": annotations,
            "categories": [{"id": place, "name": name} for place, name in enumerate(categories)],
        }
        (root / kind / "annotations.json").write_text(json.dumps(content))


def link_part(whole: pathlib.Path, part: pathlib.Path, kind: str, count: int) -> None:
    """Makes the folder of a data set with the first images, or volumes, of another."""
    for path in sorted((whole / kind).rglob("*")):
        place = path.relative_to(whole)
        number = re.search(r"\d+", str(place))
        if path.is_file() and number and int(number[0]) < count:
            (part / place).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, part / place)
    if kind == "coco":
        content = json.loads((whole / kind / "annotations.json").read_text())
        content["images"] = content["images"][:count]
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] < count]
        (part / kind / "annotations.json").write_text(json.dumps(content))


def list_work(root: pathlib.Path, kind: str) -> list[list[str]]:
    """Returns the files of each image, or volume."""
    if kind == "nifti":
        return [[str(case / f"{name}.nii.gz") for name in ("ct", "multilabel")] for case in sorted(root.glob("case*"))]
    images = list_images(root / MAKERS[kind][1][0])
    owned = {stem: [str(path)] for stem, path in images.items()}
    if kind == "masks":
        for stem, path in list_images(root / "masks").items():
            owned[stem[: stem.index("_chest") + len("_chest")]].append(str(path))
    return list(owned.values())
