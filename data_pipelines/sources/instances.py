"""A folder an image, one binary mask file an instance (2018 Data Science Bowl)."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, clean_name, make_region
from data_pipelines.images import is_image, list_images, read_mask, store_image
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.masks import outline

_CLASS = "class.txt"
_BOWL_ID = re.compile(r"[0-9a-f]{64}")  # the Bowl's folders, all of nuclei


def _list_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders with images/ and masks/ in a folder or its subfolders, such as stage1_train/."""
    if not folder.is_dir():
        return []
    found = [path.parent for pattern in ("*/masks", "*/*/masks") for path in folder.glob(pattern) if path.is_dir()]
    return sorted(path for path in found if (path / "images").is_dir())


def _count_images(folder: pathlib.Path) -> int:
    return sum(is_image(path.name) for path in folder.iterdir())


class InstanceFolders(Sequence[GroundingExample]):
    """ID/images/ID.png with ID/masks/*.png, one mask an instance, in the folder or in subfolders of it.

    All instances are of one class: the line of class.txt in the folder, or else in the folder of the image. Folders
    named as those of the 2018 Data Science Bowl, by 64 hexadecimal digits, hold nuclei and need none. A masks/ without
    files is an image without instances; images in a folder without masks/ are unused.
    """

    SUPERSEDES = ("rle_csv",)  # the Bowl's table of the same masks may lie beside the folders

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        self._folders = _list_folders(folder)
        if not self._folders:
            raise SourceError(f"{folder}: expected folders with images/ and masks/ in each")
        cases = set(self._folders)
        self.unused = [str(path) for path in list_images(folder).values() if path.parent.parent not in cases]

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        # train/images/ with many images is another layout in a subfolder.
        return any(_count_images(path / "images") == 1 for path in _list_folders(folder)[:1])

    def __len__(self) -> int:
        return len(self._folders)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        folder = self._folders[index]
        images = list(list_images(folder / "images").values())
        if len(images) != 1:
            raise SourceError(f"{folder / 'images'}: expected one image, found {len(images)}")
        image, name = store_image(images[0], root=self._folder), self._read_class(folder)
        size = (image.height, image.width)
        return GroundingExample(
            image=image.encoded,
            image_id=folder.relative_to(self._folder).as_posix(),
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(self._read_instance(name, path, size) for path in list_images(folder / "masks").values()),
        )

    def _read_class(self, folder: pathlib.Path) -> str:
        for path in (self._folder / _CLASS, folder / _CLASS):
            if path.is_file():
                name = limits.read_text(limits.check_inside(self._folder, path), errors="replace").strip()
                if not clean_name(name) or "\n" in name:
                    raise SourceError(f"{path}: expected one line, the class of the instances, found {name!r}")
                return name
        if _BOWL_ID.fullmatch(folder.name):
            return "nucleus"
        raise SourceError(f"{folder}: its instances have no class: write it into {self._folder / _CLASS}")

    def _read_instance(self, name: str, path: pathlib.Path, size: tuple[int, int]) -> Region:
        mask: np.ndarray = read_mask(path, size, self._folder)
        return make_region(name, **outline(mask))
