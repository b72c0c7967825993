"""Images as people give them to a prediction: files, bytes, Pillow images and arrays, each as RGB pixels."""

import io
import os
import pathlib
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.dicom_image import store_dicom
from data_pipelines.images import store_image
from data_pipelines.transforms import decode_image

ImageLike: TypeAlias = str | os.PathLike | bytes | np.ndarray | Image.Image

_JPEG = b"\xff\xd8\xff"
_DICOM = b"DICM"  # behind 128 bytes of anything


def _check_encoded(encoded: bytes) -> None:
    """OpenCV fills what a truncated file lacks with grey; Pillow refuses it."""
    try:
        Image.open(io.BytesIO(encoded)).load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"the {len(encoded)} bytes of the image cannot be decoded: {error}") from None


def read_image(image: ImageLike) -> np.ndarray:
    """Returns an image as uint8[H, W, 3] RGB, turned upright where EXIF data say so.

    Args:
        image: a file, read as `data_pipelines.build` reads it (16-bit grey is stretched over 0 to 255, transparent
            pixels are black, a DICOM file goes through its window); encoded bytes (PNG, JPEG); an 8-bit Pillow image;
            or uint8[H, W] or uint8[H, W, 3] RGB.

    Raises:
        ValueError: the file is missing or damaged, or the image is not of that kind.
    """
    return read_with_modality(image)[0]


def read_with_modality(image: ImageLike) -> tuple[np.ndarray, str]:
    """Returns what `read_image` does, and the modality that the file states, "" if it states none."""
    if isinstance(image, str | os.PathLike):
        if _is_dicom(image):
            picture = store_dicom(pathlib.Path(image), dataset="prediction")
            return decode_image(picture.encoded), picture.modality
        stored, encoded = store_image(image), pathlib.Path(image).read_bytes()
        return decode_image(encoded if encoded.startswith(_JPEG) else stored.encoded), ""
    return _decode(image), ""


def _is_dicom(path: str | os.PathLike) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == _DICOM
    except OSError:
        return False  # who reads it as an image says what is wrong


def _decode(image: Any) -> np.ndarray:
    """Returns encoded bytes, a Pillow image or an array as uint8[H, W, 3]; see `read_image`."""
    if isinstance(image, bytes):
        _check_encoded(image)
        return decode_image(image)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"the Pillow image has mode {image.mode}: choose a window and convert it to 8 bits first")
        try:
            upright = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, EOFError) as error:  # Pillow reads the pixels of a file only now
            raise ValueError(f"the Pillow image cannot be decoded: {error}") from None
        if upright.has_transparency_data:
            black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
            upright = Image.alpha_composite(black, upright.convert("RGBA"))
        return np.asarray(upright.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise ValueError(
            "an image array must be uint8[height, width] or uint8[height, width, 3] (RGB), not "
            f"{pixels.dtype}{list(pixels.shape)}; several images go into a list"
        )
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
