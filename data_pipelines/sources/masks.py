"""A folder of images and one of masks, one mask image a region, its phrase in the file name (BiomedParse's layout)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, find_modality, make_region
from data_pipelines.images import describe, list_images, read_mask, store_image
from data_pipelines.schema import GroundingExample, Region


def encode_mask(mask: np.ndarray) -> dict:
    """Returns the compressed COCO run-length encoding of a bool[H, W] mask."""
    return dict(coco_mask.encode(np.asfortranarray(mask, bool).view(np.uint8)))


def outline(mask: np.ndarray) -> dict[str, Any]:
    """Returns box and mask of a bool[H, W] mask, as keyword arguments of `curate.make_region`; as `box_from_mask`.

    The box is found in the run lengths, which are shorter than the mask.
    """
    runs = encode_mask(mask)
    x, y, width, height = coco_mask.toBbox(runs).tolist()  # type: ignore[arg-type]
    return {"box": np.asarray([x, y, x + width, y + height], np.float32), "mask": runs}


def _has_folders(folder: pathlib.Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


class MaskFolder(Sequence[GroundingExample]):
    """images/STEM.png with masks/STEM_PHRASE.png, where PHRASE has "+" for spaces.

    A mask is what is not black in its file and makes one region, even if it has several parts. A stem of the form
    NUMBER_MODALITY_SITE gives modality and site; the site helps to find labels ("tumor" of a lung). Images without
    masks are not examples, since nothing says that somebody looked at them.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        if not _has_folders(folder):
            raise SourceError(f"{folder}: expected the folders images/ and masks/ in it")
        images, masks = list_images(folder / "images"), list_images(folder / "masks")
        # Names rather than paths, which take four times the memory and go to every worker.
        owned: dict[str, list[str]] = {}
        self.unused: list[str] = []
        for stem, path in masks.items():
            cuts = (place for place in range(len(stem) - 1, 0, -1) if stem[place] == "_")
            owner = next((stem[:cut] for cut in cuts if stem[:cut] in images), None)
            if owner is None:
                self.unused.append(str(path))
            else:
                owned.setdefault(owner, []).append(stem[len(owner) + 1 :] + path.suffix)
        if not owned:
            found = f"only {describe(masks.values())}" if masks else "none"
            raise SourceError(
                f"{folder}: no mask belongs to an image: expected masks/STEM_PHRASE.png, found {found}. One mask an "
                "image with several labels needs a labels.json, classes.csv or label_colors.txt that names them; other "
                "names are what the source paired_masks reads"
            )
        self.unused += [str(path) for stem, path in images.items() if stem not in owned]
        self._items = [(stem, path.suffix, tuple(owned[stem])) for stem, path in images.items() if stem in owned]

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        # They have the same two folders, and import this module.
        from data_pipelines.sources.colored_masks import ColoredMasks
        from data_pipelines.sources.sa_med2d import SAMed2D

        return _has_folders(folder) and not (ColoredMasks.matches(folder) or SAMed2D.matches(folder))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        stem, suffix, masks = self._items[index]
        parts = stem.rsplit("/", 1)[-1].split("_")
        modality = find_modality(parts[1]) if len(parts) > 2 else ""
        site = " ".join(parts[2:]) if modality else ""
        image = store_image(self._folder / "images" / f"{stem}{suffix}", root=self._folder)
        size = (image.height, image.width)
        return GroundingExample(
            image=image.encoded,
            image_id=stem,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=modality or self._modality,
            regions=tuple(self._read_region(f"{stem}_", mask, site, size) for mask in masks),
        )

    def _read_region(self, start: str, mask: str, site: str, size: tuple[int, int]) -> Region:
        """Reads the region of masks/{start}{mask}, where `mask` is the phrase and the suffix."""
        phrase = mask[: mask.rindex(".")].replace("+", " ")
        path = self._folder / "masks" / f"{start}{mask}"
        pixels = read_mask(path, size, self._folder)
        try:
            return make_region(phrase, site=site, **outline(pixels))
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from None
