"""Stacks of images and masks in .npy files, as PanNuke ships them."""

import collections
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, make_region
from data_pipelines.images import encode_png
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.colored_masks import BACKGROUND
from data_pipelines.sources.masks import outline
from data_pipelines.sources.patterns import Pair, pair_files

_NUMBERS = "buif"  # kinds of NumPy types
_NO_TYPES = "tissue types that only unpickling would read, which is never done"


class Arrays(Sequence[GroundingExample]):
    """Files of n images and n stacks of masks, whose names follow patterns (`data_pipelines.sources.patterns`).

    Images are [n, H, W, 3] or [n, H, W], of bytes or of numbers from 0 to 255. Masks are [n, H, W, C], a channel a
    class, in which each value but 0 is an instance; `channels` are the classes, in their order. A channel called
    background is left out. A file that `types` finds has a word for each image, such as the tissue, which becomes the
    caption ("Colon tissue"); one that is no array of text of fixed width is counted in `notes`.

    Files are mapped, never read as a whole, and nothing is unpickled. Image ids are the words of the image file's name
    and the number of the image: FOLD/17. No folder is taken for this layout without being asked.
    """

    OPTIONS = {"images": str, "masks": str, "types": str, "channels": tuple[str, ...]}  # noqa: RUF012

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dataset: str,
        modality: str = "unknown",
        images: str = "",
        masks: str = "",
        types: str = "",
        channels: tuple[str, ...] = (),
    ):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        if not images or not masks or not channels:
            raise SourceError(
                f"{folder}: the options images and masks must be patterns of .npy files, as fold{{id}}/images.npy, and "
                "channels the classes of the masks' channels, in their order"
            )
        self._channels = channels
        self.notes: collections.Counter[str] = collections.Counter()
        pairs, self.unused = pair_files(folder, images, [masks, *([types] if types else [])])
        self._stacks: list[tuple[Pair, pathlib.Path, list[str]]] = []
        self._items: list[tuple[int, int] | SourceError] = []  # (stack, image)
        for pair in pairs:
            try:
                self._add(pair)
            except SourceError as error:  # one that cannot be read is one item, which raises
                self._items.append(error)

    def _add(self, pair: Pair) -> None:
        paths = [[path for path, _, number in pair.annotations if number == wanted] for wanted in (0, 1)]
        if len(paths[0]) != 1:
            raise SourceError(f"{pair.image}: expected one file of masks, found {len(paths[0])}")
        images, masks = self._open(pair.image), self._open(paths[0][0])
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise SourceError(f"{pair.image}: expected images [n, height, width, 3], found {list(images.shape)}")
        expected = (*images.shape[:3], len(self._channels))
        if masks.shape != expected:
            raise SourceError(
                f"{paths[0][0]}: expected {list(expected)} (images, height, width, channels), found {list(masks.shape)}"
            )
        limits.check_image_size(images.shape[2], images.shape[1], pair.image)
        types = [word for path in paths[1] for word in self._read_types(path, len(images))]
        self._items += [(len(self._stacks), place) for place in range(len(images))]
        self._stacks.append((pair, paths[0][0], types))

    def _open(self, path: pathlib.Path) -> np.ndarray:
        """Maps a file of numbers.

        Raises:
            SourceError: it is none.
        """
        array = _map_array(path, self._folder)
        if array.dtype.kind not in _NUMBERS:
            raise SourceError(f"{path}: expected an array of numbers, found the type {array.dtype}")
        return array

    def _read_types(self, path: pathlib.Path, count: int) -> list[str]:
        try:
            array = _map_array(path, self._folder)
        except SourceError:
            self.notes[_NO_TYPES] += 1
            return []
        if array.dtype.kind != "U" or array.shape != (count,):
            self.notes[_NO_TYPES] += 1
            return []
        return [str(word) for word in array]

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return False  # only the patterns tell

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        item = self._items[index]
        if isinstance(item, SourceError):
            raise item
        stack, place = item
        pair, masks, types = self._stacks[stack]
        pixels = _to_uint8(self._open(pair.image)[place], f"{pair.image}, image {place}")
        return GroundingExample(
            image=encode_png(pixels),
            image_id=f"{pair.image_id}/{place}",
            dataset=self._dataset,
            height=pixels.shape[0],
            width=pixels.shape[1],
            modality=self._modality,
            caption=f"{types[place].replace('_', ' ')} tissue" if types and types[place].strip() else "",
            regions=tuple(_read_instances(self._open(masks)[place], self._channels, f"{masks}, image {place}")),
        )


def _map_array(path: pathlib.Path, root: pathlib.Path) -> np.ndarray:
    limits.check_inside(root, path)
    if not path.is_file():
        raise SourceError(f"{path}: is no regular file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise SourceError(f"{path}: no .npy file that can be read without unpickling ({error})") from None


def _to_uint8(pixels: np.ndarray, where: str) -> np.ndarray:
    """[H, W, 3] or [H, W] of any numbers from 0 to 255 -> uint8."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = float(pixels.min()), float(pixels.max())
    if not (0 <= low <= high <= 255) or (pixels.dtype.kind == "f" and 0 < high <= 1):
        raise SourceError(f"{where}: its values go from {low:g} to {high:g}, expected 0 to 255")
    return np.rint(pixels).astype(np.uint8)


def _read_instances(masks: np.ndarray, channels: Sequence[str], where: str) -> Iterator[Region]:
    """Yields a region for each value but 0 of each channel of masks [H, W, C]."""
    for channel, name in enumerate(channels):
        if name.lower() in BACKGROUND:
            continue
        values = np.asarray(masks[..., channel])
        for value in np.unique(values):
            if not math.isfinite(value):
                raise SourceError(f"{where}: channel {channel} ({name}) holds {value}, expected numbers of instances")
            if value:
                mask = values == value
                yield make_region(name, **outline(mask))
