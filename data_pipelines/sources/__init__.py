"""Sources: each reads one layout of annotated images and is a sequence of `GroundingExample`.

A source says what its files say; boxes may leave the image, and `data_pipelines.curate` deals with that. It opens an
image only when asked for the example, and raises `SourceError` for one that cannot be used. Its `unused` are files in
the folder that belong to no example, and its `dropped`, if it has them, counts of regions that it left out, by reason.
"""

import importlib
import os
import pathlib
from collections.abc import Sequence

from data_pipelines.curate import SourceError
from data_pipelines.schema import GroundingExample

# Name: (module, class, what the folder looks like). Classes take (folder, dataset=, modality=) and have
# `matches(folder) -> bool`; a module is imported when its source is asked for.
SOURCES = {
    "voc": ("voc", "PascalVOC", "Pascal VOC: JPEGImages/ and Annotations/*.xml, or images with .xml files beside them"),
    "coco": ("coco", "COCO", "COCO: a .json file, in the folder or in annotations/, and the images it names"),
    "masks": ("masks", "MaskFolder", "masks: images/NAME.png and masks/NAME_left+lung.png, one mask file a region"),
    "yolo": ("yolo", "YOLO", "YOLO: images/ and labels/*.txt, or train/images/ and train/labels/ ..., and data.yaml"),
    "csv": ("csv_boxes", "CSVBoxes", "CSV of boxes: one .csv file of image, label and box, and the images it names"),
    "labelme": ("labelme", "LabelMe", "LabelMe: images with .json files of shapes beside them"),
    "instances": ("instances", "InstanceFolders", "instances: ID/images/ID.png, ID/masks/*.png, one an instance"),
    "colored_masks": (
        "colored_masks",
        "ColoredMasks",
        "colored masks: images/ and masks/ of the same names, and labels.json, classes.csv or label_colors.txt",
    ),
    "sa_med2d": ("sa_med2d", "SAMed2D", "SA-Med2D-20M: images/, masks/ and a .json file that pairs their files"),
    "nifti": ("nifti", "NIfTI", "NIfTI: CASE/ct.nii.gz (mri, mr, pet, image) and multilabel.nii.gz or segmentations/"),
    "dicom": ("dicom", "DICOM", "DICOM: series, with multilabel.nii.gz or segmentations/ beside, SEG, or RTSTRUCT"),
}


def _source_class(name: str):
    module, class_name, _ = SOURCES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)


def supported_layouts() -> str:
    """Returns one line a layout, for error messages and help."""
    return "\n".join(f"  {layout}" for _, _, layout in SOURCES.values())


def detect_source(folder: str | os.PathLike) -> str:
    """Returns the name of the source that reads a folder.

    Raises:
        SourceError: there is no such folder, or it has none of the supported layouts, or several.
    """
    path = pathlib.Path(folder)
    if not path.exists():
        raise SourceError(f"{folder}: there is no such folder")
    found = [name for name in SOURCES if _source_class(name).matches(path)]
    if len(found) > 1:
        raise SourceError(f"{folder} could be read as {' or as '.join(found)}: say which with --source")
    if not found:
        state = "is empty" if path.is_dir() and not any(path.iterdir()) else "has no layout that is supported"
        raise SourceError(f"{folder} {state}. Supported are:\n{supported_layouts()}")
    return found[0]


def load_source(
    name: str, folder: str | os.PathLike, *, dataset: str, modality: str = "unknown"
) -> Sequence[GroundingExample]:
    """Opens a folder as a sequence of examples.

    Args:
        name: one of `SOURCES`, or "auto" to find out.
        folder: of the layout that the source reads.
        dataset: name of the data set, stored in every example.
        modality: of the images, where the source does not say.

    Raises:
        SourceError: the folder cannot be read that way; the message says what was expected.
    """
    name = detect_source(folder) if name == "auto" else name
    if name not in SOURCES:
        raise SourceError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    path = pathlib.Path(folder)
    if not path.exists():
        raise SourceError(f"{folder}: there is no such folder")
    if path.is_dir() and not any(path.iterdir()):
        raise SourceError(f"{folder} is empty. Expected {SOURCES[name][2]}")
    return _source_class(name)(path, dataset=dataset, modality=modality)
