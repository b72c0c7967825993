"""The images that a table names: found by path or by name, DICOM files among them."""

import collections
import pathlib
from collections.abc import Iterable

from data_pipelines import limits
from data_pipelines.curate import SourceError
from data_pipelines.dicom_image import DICOM_SUFFIXES, DicomImage, store_dicom
from data_pipelines.images import IMAGE_SUFFIXES, list_images, store_image

_LISTED = 1000  # unused images that are named one by one


def stem_of(name: str) -> str:
    """Returns an image id as `list_images` has it: a path without its suffix, if that is one of an image."""
    path = name.replace("\\", "/").removeprefix("./")
    suffix = pathlib.PurePosixPath(path).suffix
    return path[: -len(suffix)] if suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES) else path


class ImageFolder:
    """The image files in a folder and its subfolders, .dcm and .dicom among them.

    Names lead to files only through this list, so that none can lead out of the folder.

    Raises:
        SourceError: two of them differ only in their suffix.
    """

    def __init__(self, root: pathlib.Path):
        self._images = list_images(root)
        for path in limits.list_files(root):
            if path.suffix.lower() in DICOM_SUFFIXES:
                stem = path.relative_to(root).with_suffix("").as_posix()
                if stem in self._images:
                    raise SourceError(
                        f"{self._images[stem]} and {path} have the same name: rename one, it is the image's id"
                    )
                self._images[stem] = path
        self.root = root
        self._by_name: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
        for stem, path in self._images.items():
            self._by_name[pathlib.PurePosixPath(stem).name].append(path)

    def find_all(self, name: str) -> list[pathlib.Path]:
        """Returns the image at this path below the folder, else all of this name; the suffix does not count."""
        stem = stem_of(name)
        if stem in self._images:
            return [self._images[stem]]
        return self._by_name.get(pathlib.PurePosixPath(stem).name, [])

    def find(self, name: str, where: str) -> pathlib.Path:
        """Returns the one image of a name.

        Args:
            name: path or name, with or without suffix.
            where: what names it, for messages.

        Raises:
            SourceError: there is none, or several.
        """
        paths, stem = self.find_all(name), stem_of(name)
        if len(paths) != 1:
            found = f"several images {stem}: {', '.join(map(str, paths))}" if paths else f"no image {stem}.*"
            raise SourceError(f"{where}: there is {found}")
        return paths[0]

    def unused(self, names: Iterable[str]) -> list[str]:
        """Returns the images that none of the names finds; a line that counts them if there are more than 1000."""
        used = {path for name in names for path in self.find_all(name)}
        paths = [str(path) for path in self._images.values() if path not in used]
        return paths if len(paths) <= _LISTED else [f"{self.root}: {len(paths)} images without annotation"]

    def store(self, path: pathlib.Path, *, dataset: str, annotated_size: tuple[int, int] | None = None) -> DicomImage:
        """Reads one of the images; what a DICOM header would say is empty where it is none.

        Args: as `store_image` and `store_dicom`.

        Raises:
            SourceError: as these.
        """
        return store_any(path, self.root, dataset=dataset, annotated_size=annotated_size)


def store_any(
    path: pathlib.Path, root: pathlib.Path, *, dataset: str, annotated_size: tuple[int, int] | None = None
) -> DicomImage:
    """As `ImageFolder.store`, of a file in the folder `root`."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        limits.check_inside(root, path)
        return store_dicom(path, dataset=dataset, annotated_size=annotated_size)
    image = store_image(path, annotated_size, root)
    return DicomImage(image.encoded, image.height, image.width)
