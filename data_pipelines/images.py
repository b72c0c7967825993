"""Image files as records store them: read once to their end to be sure of them, re-encoded only where they must be."""

import contextlib
import contextvars
import dataclasses
import io
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from data_pipelines import limits
from data_pipelines.curate import SourceError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # EXIF tag
_PNG_BIT_DEPTH = 24  # place of the byte in the file
_PREVIEW_SIDE = 64  # pixels: a preview is as small as leaves its sides this long, but no smaller than an eighth
_REDUCTIONS = (8, 4, 2)
_JPEG_FORMATS = ("JPEG", "MPO")  # the latter is of several pictures, of which the first counts
# The best filter for each row, and only runs compressed: as few bytes as with zlib's level 6, in a quarter of its time.
_PNG = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
# How files begin, and what reads them.
_FORMATS = (
    (b"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((start, GifImagePlugin.GifImageFile) for start in (b"GIF87a", b"GIF89a")),  # masks of DRIVE
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


class Previews:
    """Small grey pictures of images that were just decoded, so that what needs them need not decode again.

    The last image only is kept: a source that makes several before one is asked for costs a second decoding.
    """

    def __init__(self) -> None:
        self._last: tuple[bytes, np.ndarray] | None = None

    def keep(self, encoded: bytes, preview: np.ndarray) -> None:
        self._last = (encoded, preview)

    def find(self, encoded: bytes, where: object) -> np.ndarray:
        """Returns `make_preview` of an encoded image; `where` names it in messages.

        Raises:
            SourceError: it cannot be decoded.
        """
        if self._last is not None and self._last[0] is encoded:
            return self._last[1]
        return _decode_preview(open_image(encoded, where), where)


_PREVIEWS: contextvars.ContextVar[Previews | None] = contextvars.ContextVar("previews", default=None)


@contextlib.contextmanager
def keep_previews() -> Iterator[Previews]:
    """Keeps the preview of what `store_image` and `encode_png` make in the body of a `with` statement."""
    token = _PREVIEWS.set(Previews())
    try:
        yield _PREVIEWS.get()  # type: ignore[misc]
    finally:
        _PREVIEWS.reset(token)


def make_preview(image: Image.Image) -> np.ndarray:
    """Makes a decoded image small and grey, each pixel the mean of 8 x 8, 4 x 4 or 2 x 2, or as it was.

    Returns:
        uint8[height / n, width / n], rounded up, where n is the largest that leaves sides of 64 pixels.
    """
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    factor = next((n for n in _REDUCTIONS if min(image.size) // n >= _PREVIEW_SIDE), 1)
    return np.asarray((image.reduce(factor) if factor > 1 else image).convert("L"))


def _decode_preview(image: Image.Image, where: object) -> np.ndarray:
    """Decodes an opened image for its preview; all bytes of a JPEG are read, but only the means of blocks computed."""
    if image.format in _JPEG_FORMATS:
        image.draft("L", (_PREVIEW_SIDE, _PREVIEW_SIDE))
    _load(image, where)
    return make_preview(image)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8[H, W] or uint8[H, W, 3] RGB -> PNG."""
    ordered = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".png", ordered, _PNG)[1].tobytes()
    if previews := _PREVIEWS.get():
        previews.keep(encoded, make_preview(Image.fromarray(pixels)))
    return encoded


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
            raise ValueError("it is no JPEG, PNG, BMP, TIFF, GIF or WebP")
        image = factory(io.BytesIO(encoded), "")
    except _DAMAGED as error:
        raise _undecodable(where, error) from None
    limits.check_image_size(*image.size, where)
    return image


def _undecodable(where: object, error: Exception) -> SourceError:
    return SourceError(f"{where}: the image cannot be decoded ({error}); replace the file or leave it out")


def _open(path: str | os.PathLike, root: str | os.PathLike | None) -> tuple[bytes, Image.Image]:
    if root is not None:
        limits.check_inside(root, path)
    try:
        encoded = limits.read_bytes(path, "image_bytes")
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such image") from None
    return encoded, open_image(encoded, path)


def _load(image: Image.Image, where: object) -> None:
    try:
        image.load()
    except _DAMAGED as error:
        raise _undecodable(where, error) from None


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
    encoded, image = _open(path, root)
    jpeg = image.format in _JPEG_FORMATS
    try:
        turn = image.getexif().get(_ORIENTATION, 1) if jpeg else 1
    except _DAMAGED as error:
        raise _undecodable(path, error) from None
    size, plain = (image.height, image.width), image.mode in ("L", "RGB")
    if jpeg and plain and turn == 1:
        preview = _decode_preview(image, path)
        _check_annotated(path, size, annotated_size)
        return _keep(encoded, preview, size)
    _load(image, path)
    try:
        frames = 1 if jpeg else getattr(image, "n_frames", 1)
    except _DAMAGED as error:
        raise _undecodable(path, error) from None
    if frames != 1:
        raise SourceError(f"{path}: holds several pictures; split them into files of their own")
    if turn != 1 and annotated_size and annotated_size != size:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
        size = (image.height, image.width)
    _check_annotated(path, size, annotated_size)
    wide = image.format == "PNG" and encoded[_PNG_BIT_DEPTH] == 16
    if image.format == "PNG" and plain and not wide and "transparency" not in image.info:
        return _keep(encoded, make_preview(image), size)
    return StoredImage(encode_png(_to_uint8(image, wide)), *size)


def _check_annotated(path: str | os.PathLike, size: tuple[int, int], annotated_size: tuple[int, int] | None) -> None:
    if annotated_size and annotated_size != size:
        raise SourceError(
            f"{path}: the image is {size[1]} x {size[0]} pixels, its annotation says "
            f"{annotated_size[1]} x {annotated_size[0]}; the boxes belong to another version of it"
        )


def _keep(encoded: bytes, preview: np.ndarray, size: tuple[int, int]) -> StoredImage:
    if previews := _PREVIEWS.get():
        previews.keep(encoded, preview)
    return StoredImage(encoded, *size)


def _decode_mask(path: str | os.PathLike, size: tuple[int, int], root: str | os.PathLike | None) -> Image.Image:
    _, image = _open(path, root)
    _load(image, path)
    if image.format not in _JPEG_FORMATS and getattr(image, "n_frames", 1) != 1:
        raise SourceError(f"{path}: holds several pictures; split them into files of their own")
    if (image.height, image.width) != size:
        raise SourceError(f"{path}: the mask is {image.width} x {image.height} pixels, its image {size[1]} x {size[0]}")
    return image


def read_mask(
    path: str | os.PathLike, size: tuple[int, int], root: str | os.PathLike | None = None, threshold: int = 1
) -> np.ndarray:
    """Returns bool[height, width]: where a colour channel of a mask image is not 0 (transparency does not count).

    Args:
        path: mask image.
        size: (height, width) of its image.
        root: as in `store_image`.
        threshold: above 1, where a channel has this value or a higher one; images of one bit have 0 and 255.

    Raises:
        SourceError: the file is damaged, its size is not the image's, or as `store_image`.
    """
    image = _decode_mask(path, size, root)
    if image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    pixels = np.asarray(image).reshape(*size, -1)
    shown = pixels[..., 0] >= threshold if threshold > 1 else pixels[..., 0] != 0
    for channel in range(1, pixels.shape[-1] - ("A" in image.getbands())):
        shown |= pixels[..., channel] >= threshold if threshold > 1 else pixels[..., channel] != 0
    # Column after column, as COCO's run lengths are made: NumPy takes twice as long to turn it around for them.
    return cv2.transpose(shown.view(np.uint8)).view(bool).T


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
