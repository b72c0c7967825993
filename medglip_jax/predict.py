"""Prediction: images and phrases in; boxes in each image's own pixels, scores and phrases out.

model = MedGLIP.from_pretrained("runs/demo")
prediction = model.predict("chest.png", ["left lung", "nodule"])

python -m medglip_jax.predict --checkpoint DIR --image F [F ...] --phrases "left lung. nodule" --out F.png
python -m medglip_jax.predict --checkpoint DIR --volume F.nii.gz --phrases "liver. cyst" --masks OUT.nii.gz
"""

import argparse
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from flax.linen import Module
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from data_pipelines.images import store_image
from data_pipelines.text import TextTokenizer, build_prompts, split_phrases
from data_pipelines.transforms import decode_image, resize_into
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.drawing import SheetEntry, contact_sheet
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import write_json
from medglip_jax.inference import Detections, make_detector, merge, power_of_two, stack_prompts
from medglip_jax.mask_outputs import Rle, decode, to_text
from medglip_jax.pretrained import load_model
from medglip_jax.volume_masks import PLANE_CHOICES, WINDOW_CHOICES, label_file

ImageLike: TypeAlias = str | os.PathLike | bytes | np.ndarray | Image.Image
Phrases: TypeAlias = str | Sequence[str]

_JPEG = b"\xff\xd8\xff"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was found in an image, best first.

    Attributes:
        boxes: float32[n, 4], x0 y0 x1 y1 in pixels of the image as it was given, half-open (x1 - x0 is the width).
        scores: float32[n], 0 to 1.
        phrases: the phrase of each box.
        masks: the mask of each box, of the image's size, as COCO run lengths ({"size": [h, w], "counts": bytes}), where
            the model has masks of boxes; else None. `mask_outputs.decode` makes an array of one.
        phrase_masks: the masks that are not empty by their phrase, where the model has masks of phrases; else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    phrases: list[str]
    masks: list[Rle] | None = None
    phrase_masks: dict[str, Rle] | None = None

    def __len__(self) -> int:
        return len(self.scores)


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
            pixels are black); encoded bytes (PNG, JPEG); an 8-bit Pillow image; or uint8[H, W] or uint8[H, W, 3] RGB.

    Raises:
        ValueError: the file is missing or damaged, or the image is not of that kind.
    """
    if isinstance(image, str | os.PathLike):
        stored, encoded = store_image(image), pathlib.Path(image).read_bytes()
        return decode_image(encoded if encoded.startswith(_JPEG) else stored.encoded)
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


class MedGLIP:
    """A trained detector with its preprocessing.

    One program is compiled for each bucket of shapes: images in a batch (1, 2, 4 ... up to the batch size), tokens of a
    prompt (64, 128, 256) and its phrases (powers of two). All images go onto the canvas of the recipe.
    """

    def __init__(self, model: Module, params: Any, config: ConfigDict, tokenizer: TextTokenizer):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._detector = make_detector(model, config)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, use_ema: bool | None = None) -> "MedGLIP":
        """Loads a checkpoint; see `load_model`."""
        model, params, config, tokenizer = load_model(directory, use_ema=use_ema)
        return cls(model, params, config, tokenizer)

    @overload
    def predict(
        self,
        images: ImageLike,
        phrases: Phrases,
        *,
        threshold: float = ...,
        max_detections: int | None = ...,
        batch_size: int = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageLike],
        phrases: Phrases | Sequence[Phrases],
        *,
        threshold: float = ...,
        max_detections: int | None = ...,
        batch_size: int = ...,
    ) -> list[Prediction]: ...

    def predict(self, images, phrases, *, threshold=0.3, max_detections=None, batch_size=8):
        """Finds phrases in one image or in each of a list.

        More phrases than a prompt holds go into several prompts, each with a pass over the image.

        Args:
            images: an image, or a list of them (see `read_image`).
            phrases: "left lung. nodule", or a list of phrases; for a list of images also a list of such lists, one an
                image. A phrase that is given twice counts once.
            threshold: least score of a box, 0 to 1. The recipe's `detection.score_threshold` comes before it.
            max_detections: most boxes of an image; None and the most is the recipe's `detection.max_detections`.
            batch_size: most images and prompts that go through the model together.

        Returns:
            A `Prediction`; for a list of images a list of them.

        Raises:
            ValueError: no phrases or an empty one, a phrase that alone is too long for a prompt (`PromptTooLong`), an
                image that cannot be read, or an option out of its range.
        """
        limit = self.config.detection.max_detections
        if max_detections is not None and not 1 <= max_detections <= limit:
            raise ValueError(f"max_detections is {max_detections}: this model gives between 1 and {limit}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}: scores are between 0 and 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        single = not isinstance(images, list | tuple)
        pixels = [read_image(image) for image in ([images] if single else images)]
        asked = _phrases_of_each(phrases, len(pixels), single)
        predictions = [
            self._select(found, names, threshold, max_detections or limit)
            for found, names in zip(self._detect(pixels, asked, batch_size), asked, strict=True)
        ]
        return predictions[0] if single else predictions

    @staticmethod
    def _select(found: Detections, names: list[str], threshold: float, limit: int) -> Prediction:
        kept = np.flatnonzero(found.scores >= threshold)[:limit]
        return Prediction(
            found.boxes[kept],
            found.scores[kept],
            [names[i] for i in found.phrases[kept]],
            None if found.masks is None else [found.masks[i] for i in kept],
            None if found.phrase_masks is None else {names[i]: mask for i, mask in found.phrase_masks.items()},
        )

    def _detect(self, pixels: list[np.ndarray], asked: list[list[str]], batch_size: int) -> list[Detections]:
        """Runs every pair of image and prompt, and joins them by image."""
        max_tokens = self.config.data.max_tokens
        chunks = [build_prompts(names, self.tokenizer, max_tokens) for names in asked]
        canvases = [resize_into(image, tuple(self.config.data.canvas)) for image in pixels]
        pairs = [(image, prompt) for image, prompts in enumerate(chunks) for prompt, _ in prompts]
        rows: list[dict[str, np.ndarray]] = []
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            padded = batch + batch[-1:] * (min(power_of_two(len(batch)), batch_size) - len(batch))
            found = self._detector(
                self.params,
                image=np.stack([canvases[image][0] for image, _ in padded]),
                image_size=np.array([canvases[image][1] for image, _ in padded], np.int32),
                **stack_prompts([prompt for _, prompt in padded], max_tokens),
            )
            found = {key: np.asarray(value) for key, value in found.items()}
            rows += [{key: value[i] for key, value in found.items()} for i in range(len(batch))]
        results, start = [], 0
        for image, prompts, (_, _, scale) in zip(pixels, chunks, canvases, strict=True):
            parts, places = rows[start : start + len(prompts)], [indices for _, indices in prompts]
            limit = self.config.detection.max_detections
            margin = self.config.detection.mask_margin
            results.append(
                merge(parts, places, limit, scale=np.asarray(scale), size=image.shape[:2], mask_margin=margin)
            )
            start += len(prompts)
        return results


def _phrases_of_each(phrases: Any, count: int, single: bool) -> list[list[str]]:
    """Returns the phrases of each of `count` images."""
    if single or isinstance(phrases, str) or all(isinstance(phrase, str) for phrase in phrases):
        return [split_phrases(phrases)] * count
    if len(phrases) != count:
        raise ValueError(
            f"there are {count} images but {len(phrases)} lists of phrases: give one list an image, or one"
        )
    return [split_phrases(names) for names in phrases]


def _draw(images: Sequence[str], predictions: Sequence[Prediction], out: str) -> None:
    entries = [
        SheetEntry(
            read_image(path),
            pathlib.Path(path).name,
            found.boxes,
            found.phrases,
            found.scores,
            masks=_shown_masks(found),
        )
        for path, found in zip(images, predictions, strict=True)
    ]
    contact_sheet(entries, out, columns=4, tile=960 if len(entries) == 1 else 480)


def _shown_masks(found: Prediction) -> list[tuple[str, np.ndarray]]:
    """Returns the masks of boxes, the best last; or else those of phrases, the largest first."""
    if found.masks is not None:
        pairs = list(zip(found.phrases, found.masks, strict=True))[::-1]
    else:
        pairs = list((found.phrase_masks or {}).items())
    shown = [(phrase, decode(mask)) for phrase, mask in pairs]
    return shown if found.masks is not None else sorted(shown, key=lambda pair: -int(pair[1].sum()))


def _as_json(path: str, prediction: Prediction) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "image": path,
        "boxes": prediction.boxes.tolist(),
        "scores": prediction.scores.tolist(),
        "phrases": prediction.phrases,
    }
    if prediction.masks is not None:
        fields["masks"] = [to_text(mask) for mask in prediction.masks]
    if prediction.phrase_masks is not None:
        fields["phrase_masks"] = {phrase: to_text(mask) for phrase, mask in prediction.phrase_masks.items()}
    return fields


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Predicts, prints what was found, and draws it."""
    parser = argparse.ArgumentParser(prog="medglip predict", description="Finds phrases in images and draws the boxes.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's working directory, or an exported folder")
    add("--image", nargs="+", default=[], metavar="FILE", help="image files")
    add("--volume", metavar="PATH", help="instead: a NIfTI file, or the folder of a DICOM series; needs --masks")
    add("--masks", metavar="FILE", help="label map to write of the volume: .nii.gz, or .dcm (DICOM-SEG) of a series")
    add("--plane", choices=PLANE_CHOICES, default="auto", help="slices of the volume to look at; default: as scanned")
    add("--window", choices=WINDOW_CHOICES, default="auto", help="values of the volume that become black and white")
    add("--phrases", required=True, help="what to look for, as 'left lung. nodule'")
    add("--out", metavar="FILE", help="image file to draw the boxes into")
    add("--json", metavar="FILE", help="file to write the boxes to, in pixels of each image: x0 y0 x1 y1, half-open")
    add("--threshold", type=float, default=0.3, help="least score of a box; default: %(default)s")
    add("--max-detections", type=int, help="most boxes of an image; default: as the model was configured")
    add("--no-ema", action="store_true", help="use the parameters themselves instead of their running average")
    add_option(parser)
    options = parser.parse_args(argv)
    if bool(options.image) == bool(options.volume) or bool(options.volume) != bool(options.masks):
        raise ValueError("give --image FILE ..., or --volume PATH with --masks FILE")

    keep_compiled(options.compilation_cache)
    model = MedGLIP.from_pretrained(options.checkpoint, use_ema=False if options.no_ema else None)
    if options.volume:
        counts = label_file(
            model,
            options.volume,
            options.masks,
            split_phrases(options.phrases),
            plane=options.plane,
            window=options.window,
            threshold=options.threshold,
        )
        for phrase, count in counts.items():
            print(f"{count:10} voxels  {phrase}")
        print(f"written to {options.masks}")
        return 0
    predictions = model.predict(
        options.image, options.phrases, threshold=options.threshold, max_detections=options.max_detections
    )
    for path, prediction in zip(options.image, predictions, strict=True):
        print(f"{path}: {len(prediction)} boxes")
        for box, score, phrase in zip(prediction.boxes, prediction.scores, prediction.phrases, strict=True):
            print(f"  {score:.2f}  {' '.join(f'{value:7.1f}' for value in box)}  {phrase}")
    if options.json:
        write_json(
            [_as_json(path, found) for path, found in zip(options.image, predictions, strict=True)], options.json
        )
    if options.out:
        _draw(options.image, predictions, options.out)
        print(f"drawn in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
