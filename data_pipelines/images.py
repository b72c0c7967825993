"""Image files as records store them: decoded once in full to be sure of them, re-encoded only where they must be."""

import dataclasses
import io
import os
import pathlib
import struct
from collections.abc import Iterable

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from data_pipelines import limits
from data_pipelines.curate import SourceError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # EXIF tag
_PNG_BIT_DEPTH = 24  # place of the byte in the file
# How files begin, and what reads them.
_FORMATS = (
    (b"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((start, TiffImagePlugin.TiffImageFile) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
# What Pillow raises for damaged files: its plugins let errors of struct and of indices through.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, struct.error)


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """Encoded PNG or JPEG bytes that decode to uint8[height, width] or uint8[height, width, 3]."""

    encoded: bytes
    height: int
    width: int


def list_images(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the image files in a folder and its subfolders by their relative path without suffix, sorted.

    Hidden files do not count (see `limits.list_files`).

    Raises:
        SourceError: two images differ only in their suffix.
    """
    images: dict[str, pathlib.Path] = {}
    for path in limits.list_files(folder):
        if is_image(path.name):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in images:
                raise SourceError(f"{images[stem]} and {path} have the same name: rename one, it is the image's id")
            images[stem] = path
    return images


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not limits.is_hidden(name)


def open_image(encoded: bytes, where: object) -> Image.Image:
    """Reads the header of an encoded image, whatever its file is called; `load` of the result decodes it.

    `Image.open` would try some fifty formats, among them programs (EPS), and has one limit for the whole process.

    Raises:
        SourceError: it is of no format that is read, damaged, or larger than `Limits.image_pixels`.
    """
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        factory = WebPImagePlugin.WebPImageFile
    else:
        factory = next((factory for start, factory in _FORMATS if encoded.startswith(start)), None)
    try:
        if factory is None:
            raise ValueError("it is no JPEG, PNG, BMP, TIFF or WebP")
        image = factory(io.BytesIO(encoded), "")
    except _DAMAGED as error:
        raise _undecodable(where, error) from None
    limits.check_image_size(*image.size, where)
    return image


def _undecodable(where: object, error: Exception) -> SourceError:
    return SourceError(f"{where}: the image cannot be decoded ({error}); replace the file or leave it out")


def _decode(path: str | os.PathLike, root: str | os.PathLike | None) -> tuple[bytes, Image.Image]:
    if root is not None:
        limits.check_inside(root, path)
    try:
        encoded = limits.read_bytes(path, "image_bytes")
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such image") from None
    image = open_image(encoded, path)
    try:
        image.load()
    except _DAMAGED as error:
        raise _undecodable(path, error) from None
    return encoded, image


def _grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W] where the three channels are the same."""
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels


def _to_uint8(image: Image.Image, wide: bool) -> np.ndarray:
    """Returns uint8[H, W] or uint8[H, W, 3]. Above 8 bits a grey image's own range becomes 0 to 255."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        return np.rint((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    if image.mode in ("1", "L") and not wide:
        return np.asarray(image.convert("L"))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return _grey_if_equal(np.asarray(image.convert("RGB")))


def store_image(
    path: str | os.PathLike, annotated_size: tuple[int, int] | None = None, root: str | os.PathLike | None = None
) -> StoredImage:
    """Reads and checks an image file.

    8-bit grey or RGB JPEG and PNG files are kept byte for byte. Anything else becomes PNG: palettes are looked up,
    transparent pixels go black, 16-bit grey is stretched over 0 to 255. A JPEG whose EXIF data turn it is stored
    as its annotations see it, so that decoders with and without EXIF agree.

    Args:
        path: image file.
        annotated_size: (height, width) that the annotation was made on, if it says so.
        root: the input folder, out of which no symbolic link may lead (see `limits.check_inside`).

    Raises:
        SourceError: the file is missing, damaged or cut short, holds several pictures, has another size, is larger
            than `limits.Limits` allows, or lies outside `root`.
    """
    encoded, image = _decode(path, root)
    kind = "JPEG" if image.format == "MPO" else image.format
    try:
        frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
        turn = image.getexif().get(_ORIENTATION, 1) if kind == "JPEG" else 1
    except _DAMAGED as error:
        raise _undecodable(path, error) from None
    if frames != 1:
        raise SourceError(f"{path}: holds several pictures; split them into files of their own")
    wide = kind == "PNG" and encoded[_PNG_BIT_DEPTH] == 16
    keep = kind in ("JPEG", "PNG") and image.mode in ("L", "RGB") and not wide and "transparency" not in image.info
    if turn != 1:
        keep = False
        if annotated_size and annotated_size != (image.height, image.width):
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
    size = (image.height, image.width)
    if annotated_size and annotated_size != size:
        raise SourceError(
            f"{path}: the image is {size[1]} x {size[0]} pixels, its annotation says "
            f"{annotated_size[1]} x {annotated_size[0]}; the boxes belong to another version of it"
        )
    if not keep:
        stream = io.BytesIO()
        Image.fromarray(_to_uint8(image, wide)).save(stream, "PNG")
        encoded = stream.getvalue()
    return StoredImage(encoded, *size)


def _decode_mask(path: str | os.PathLike, size: tuple[int, int], root: str | os.PathLike | None) -> Image.Image:
    _, image = _decode(path, root)
    if (image.height, image.width) != size:
        raise SourceError(f"{path}: the mask is {image.width} x {image.height} pixels, its image {size[1]} x {size[0]}")
    return image


def read_mask(path: str | os.PathLike, size: tuple[int, int], root: str | os.PathLike | None = None) -> np.ndarray:
    """Returns bool[height, width]: where any colour channel of a mask image is not 0 (transparency does not count).

    Args:
        path: mask image.
        size: (height, width) of its image.
        root: as in `store_image`.

    Raises:
        SourceError: the file is damaged, its size is not the image's, or as `store_image`.
    """
    image = _decode_mask(path, size, root)
    if image.mode == "P":
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if "A" in image.getbands():
        pixels = pixels[..., :-1]
    return np.any(pixels.reshape(*size, -1), axis=-1, keepdims=True)[..., 0]


def read_label_map(
    path: str | os.PathLike, size: tuple[int, int], colours: bool, root: str | os.PathLike | None = None
) -> np.ndarray:
    """Returns int64[height, width]: the label of each pixel of a mask image that holds several.

    Args:
        path: mask image; transparency does not count.
        size: (height, width) of its image.
        colours: whether a label is its colour, then red * 65536 + green * 256 + blue, or its value: the grey value (of
            up to 16 bits), or the index into the palette.
        root: as in `store_image`.

    Raises:
        SourceError: as `read_mask`, or the mask has colours where values are expected.
    """
    image = _decode_mask(path, size, root)
    if not colours and (image.mode in ("P", "1", "L") or image.mode.startswith("I")):
        return np.asarray(image, np.int64)
    pixels = np.asarray(image.convert("RGB"), np.int64)  # [H, W, 3]
    if colours:
        return pixels @ np.asarray([65536, 256, 1])
    if not (pixels == pixels[..., :1]).all():
        raise SourceError(f"{path}: the mask has colours, its table of labels numbers: give the table r, g, b")
    return pixels[..., 0]


def describe(paths: Iterable[object], limit: int = 3) -> str:
    """Names the first few of many files in an error message."""
    names = [str(path) for path in paths]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
