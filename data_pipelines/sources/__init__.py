"""Sources: each reads one layout of annotated images and is a sequence of `GroundingExample`.

A source says what its files say; boxes may leave the image, and `data_pipelines.curate` deals with that. It opens an
image only when asked for the example, and raises `SourceError` for one that cannot be used. Its `unused` are files in
the folder that belong to no example, and its `dropped`, if it has them, counts of regions that it left out, by reason.

A source is a class that takes (folder, dataset=, modality=) and can be pickled. What else a class may have:

    matches(folder) -> bool   static; whether the folder has its layout, which `detect_source` asks
    OPTIONS                   {name: type} of further keywords that a user may set, each with a default
    SUPERSEDES                names of sources whose layout its own refines: where both match, it is the one
    EXHAUSTIVE                False if it does not mark all that its labels name: what has no box may be there
    starts                    places of the first examples of what is read at once (volumes): no two processes share it

A layout that only its options tell, such as patterns of names, never matches: it has to be asked for by name.

A class with the keyword `rule` takes the fields of `data_pipelines.volumes.SliceRule` as options.
"""

import importlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.curate import SourceError
from data_pipelines.schema import GroundingExample

# Name: (module, class, what the folder looks like). A module is imported when its source is asked for.
SOURCES = {
    "voc": ("voc", "PascalVOC", "Pascal VOC: JPEGImages/ and Annotations/*.xml, or images with .xml files beside them"),
    "coco": ("coco", "COCO", "COCO: a .json file, in the folder or in annotations/, and the images it names"),
    "masks": ("masks", "MaskFolder", "masks: images/NAME.png and masks/NAME_left+lung.png, one mask file a region"),
    "yolo": ("yolo", "YOLO", "YOLO: images/ and labels/*.txt, or train/images/ and train/labels/ ..., and data.yaml"),
    "csv": ("csv_boxes", "CSVBoxes", "CSV of boxes: one .csv file of image, label and box, and the images it names"),
    "rle_csv": ("rle_csv", "RLECSV", "CSV of run lengths: .csv files of ImageId and EncodedPixels, and the images"),
    "labelme": ("labelme", "LabelMe", "LabelMe: images with .json files of shapes beside them"),
    "instances": ("instances", "InstanceFolders", "instances: ID/images/ID.png, ID/masks/*.png, one an instance"),
    "colored_masks": (
        "colored_masks",
        "ColoredMasks",
        "colored masks: images/ and masks/ of the same names, and labels.json, classes.csv or label_colors.txt",
    ),
    "paired_masks": (
        "paired_masks",
        "PairedMasks",
        "paired masks: images and masks whose names follow the patterns that the options images and masks give",
    ),
    "arrays": ("arrays", "Arrays", "arrays: .npy files of images and masks that the options images and masks find"),
    "sa_med2d": ("sa_med2d", "SAMed2D", "SA-Med2D-20M: images/, masks/ and a .json file that pairs their files"),
    "nifti": ("nifti", "NIfTI", "NIfTI: CASE/ct.nii.gz (mri, mr, pet, image) and multilabel.nii.gz or segmentations/"),
    "dicom": ("dicom", "DICOM", "DICOM: series, with multilabel.nii.gz or segmentations/ beside, SEG, or RTSTRUCT"),
    "ms_cxr": ("ms_cxr", "MSCXR", "MS-CXR: its .csv or .json file of sentences and boxes, and the images it names"),
    "flickr_entities": (
        "flickr_entities",
        "FlickrEntities",
        "Flickr30k Entities: Sentences/*.txt with [/EN#...] marks, Annotations/*.xml, and images",
    ),
    "triplets": ("triplets", "Triplets", "triplets: a .json or .jsonl list of image, region and description"),
    "reports": (
        "reports",
        "Reports",
        "reports: one .csv or .jsonl file of image and sentence, and the images it names",
    ),
}


def _source_class(name: str) -> Any:
    if ":" in name:
        module, class_name = name.split(":", 1)
    elif name in SOURCES:
        module, class_name = f"{__name__}.{SOURCES[name][0]}", SOURCES[name][1]
    else:
        raise SourceError(
            f"unknown source {name!r}; known: {', '.join(SOURCES)}, or your own class as package.module:Class"
        )
    try:
        return getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        # Only the module that was asked for: one that it needs itself is a fault of its own.
        if ":" not in name or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise SourceError(f"source {name!r}: there is no module {error.name!r} on Python's path") from None
    except (AttributeError, ValueError):
        raise SourceError(f"source {name!r}: expected package.module:Class, {module!r} has no {class_name!r}") from None


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
    classes = {name: _source_class(name) for name in SOURCES}
    matching = [name for name, cls in classes.items() if cls.matches(path)]
    superseded = {other for name in matching for other in getattr(classes[name], "SUPERSEDES", ())}
    found = [name for name in matching if name not in superseded]
    if len(found) > 1:
        raise SourceError(f"{folder} could be read as {' or as '.join(found)}: say which with --source")
    if not found:
        state = "is empty" if path.is_dir() and not any(path.iterdir()) else "has no layout that is supported"
        raise SourceError(f"{folder} {state}. Supported are:\n{supported_layouts()}")
    return found[0]


def load_source(
    name: str,
    folder: str | os.PathLike,
    *,
    dataset: str,
    modality: str = "unknown",
    options: Mapping[str, Any] | None = None,
) -> Sequence[GroundingExample]:
    """Opens a folder as a sequence of examples.

    Args:
        name: one of `SOURCES`, a class of your own as "package.module:Class", or "auto" to find out.
        folder: of the layout that the source reads.
        dataset: name of the data set, stored in every example.
        modality: of the images, where the source does not say.
        options: of the source, by name; for volumes the fields of `data_pipelines.volumes.SliceRule`.

    Raises:
        SourceError: the folder cannot be read that way, or the source has no such option; the message says what was
            expected.
    """
    name = detect_source(folder) if name == "auto" else name
    source = _source_class(name)
    path = pathlib.Path(folder)
    if not path.exists():
        raise SourceError(f"{folder}: there is no such folder")
    if path.is_dir() and not any(path.iterdir()):
        layout = SOURCES[name][2] if name in SOURCES else f"what {name} reads"
        raise SourceError(f"{folder} is empty. Expected {layout}")
    keywords = {}
    if options:
        from data_pipelines.sources.options import read_options

        keywords = read_options(name, source, options)
    return source(path, dataset=dataset, modality=modality, **keywords)
