"""Prediction: images and phrases in; boxes in each image's own pixels, scores and phrases out.

model = MedGLIP.from_pretrained("runs/demo")
prediction = model.predict("chest.png", ["left lung", "nodule"])

python -m medglip_jax.predict --checkpoint DIR --image F [F ...] --phrases "left lung. nodule" --out F.png
python -m medglip_jax.predict --checkpoint DIR --volume F.nii.gz --phrases "liver. cyst" --masks OUT.nii.gz
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from flax.linen import Module
from ml_collections import ConfigDict

from data_pipelines.curate import find_modality
from data_pipelines.schema import MODALITIES
from data_pipelines.text import TextTokenizer, build_prompts, make_prefix, split_phrases
from data_pipelines.transforms import resize_into
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.drawing import SheetEntry, contact_sheet
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import write_json
from medglip_jax.inference import (
    Detections,
    make_classifier,
    make_detector,
    merge,
    power_of_two,
    stack_prompts,
)
from medglip_jax.mask_outputs import Rle, decode, to_text
from medglip_jax.pictures import ImageLike, read_image, read_with_modality
from medglip_jax.pretrained import load_model
from medglip_jax.volume_masks import PLANE_CHOICES, WINDOW_CHOICES, label_file

Phrases: TypeAlias = str | Sequence[str]

AUTO = "auto"  # the modality that the file states, else the one that the model's classifier sees


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was found in an image, best first.

    Attributes:
        boxes: float32[n, 4], x0 y0 x1 y1 in pixels of the image as it was given, half-open (x1 - x0 is the width).
        scores: float32[n], 0 to 1.
        phrases: the phrase of each box.
        modality: of the image, as it was stated or classified; "unknown" if neither.
        probability: of that modality, if it was classified; else None.
        masks: the mask of each box, of the image's size, as COCO run lengths ({"size": [h, w], "counts": bytes}), where
            the model has masks of boxes; else None. `mask_outputs.decode` makes an array of one.
        phrase_masks: the masks that are not empty by their phrase, where the model has masks of phrases; else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    phrases: list[str]
    modality: str = MODALITIES[0]
    probability: float | None = None
    masks: list[Rle] | None = None
    phrase_masks: dict[str, Rle] | None = None

    def __len__(self) -> int:
        return len(self.scores)


class MedGLIP:
    """A trained detector with its preprocessing.

    One program is compiled for each bucket of shapes: images in a batch (1, 2, 4 ... up to the batch size), tokens of a
    prompt (64, 128, 256) and its phrases (powers of two). All images go onto the canvas of the recipe.
    """

    def __init__(self, model: Module, params: Any, config: ConfigDict, tokenizer: TextTokenizer):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._detector = make_detector(model, config)
        self._classifier = make_classifier(model, config) if config.model.modality.classifier else None

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
        modality: str = ...,
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
        modality: str | Sequence[str] = ...,
    ) -> list[Prediction]: ...

    def predict(
        self, images, phrases, *, threshold=0.3, max_detections=None, batch_size=8, modality: str | Sequence[str] = AUTO
    ):
        """Finds phrases in one image or in each of a list.

        More phrases than a prompt holds go into several prompts, each with a pass over the image.

        Args:
            images: an image, or a list of them (see `read_image`).
            phrases: "left lung. nodule", or a list of phrases; for a list of images also a list of such lists, one an
                image. A phrase that is given twice counts once.
            threshold: least score of a box, 0 to 1. The recipe's `detection.score_threshold` comes before it.
            max_detections: most boxes of an image; None and the most is the recipe's `detection.max_detections`.
            batch_size: most images and prompts that go through the model together.
            modality: one of `schema.MODALITIES`, of all images, or a list of them, one an image. "auto" takes what
                the file states (DICOM does), else what the model's classifier sees, if it has one, else "unknown". It
                chooses the parts of a model of modalities (those of an unknown one are the shared parts), and begins
                the prompt where `evaluation.modality_prefix` of the recipe is set.

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
        read = [read_with_modality(image) for image in ([images] if single else images)]
        asked = _phrases_of_each(phrases, len(read), single)
        canvases = [resize_into(image, tuple(self.config.data.canvas)) for image, _ in read]
        told = self._tell_modalities(modality, [stated for _, stated in read], canvases, batch_size)
        detections = self._detect([image for image, _ in read], canvases, asked, [name for name, _ in told], batch_size)
        predictions = [
            self._select(found, names, threshold, max_detections or limit, *modality)
            for found, names, modality in zip(detections, asked, told, strict=True)
        ]
        return predictions[0] if single else predictions

    @staticmethod
    def _select(
        found: Detections, names: list[str], threshold: float, limit: int, modality: str, probability: float | None
    ) -> Prediction:
        kept = np.flatnonzero(found.scores >= threshold)[:limit]
        return Prediction(
            found.boxes[kept],
            found.scores[kept],
            [names[i] for i in found.phrases[kept]],
            modality,
            probability,
            None if found.masks is None else [found.masks[i] for i in kept],
            None if found.phrase_masks is None else {names[i]: mask for i, mask in found.phrase_masks.items()},
        )

    def _tell_modalities(
        self, asked: str | Sequence[str], stated: list[str], canvases: list[Any], batch_size: int
    ) -> list[tuple[str, float | None]]:
        """Returns the modality of each image, and its probability where it was classified."""
        wanted = [asked] * len(stated) if isinstance(asked, str) else list(asked)
        if len(wanted) != len(stated):
            raise ValueError(f"there are {len(stated)} images but {len(wanted)} modalities: give one an image, or one")
        default = self.config.evaluation.modality or MODALITIES[0]
        for name in (*wanted, default):
            if name != AUTO and name != MODALITIES[0] and not find_modality(name):
                raise ValueError(f"modality is {name!r}: expected {AUTO} or one of {', '.join(MODALITIES)}")
        named = [(file or default) if name == AUTO else name for name, file in zip(wanted, stated, strict=True)]
        told: list[tuple[str, float | None]] = [(find_modality(name) or name, None) for name in named]
        open_places = [i for i, name in enumerate(wanted) if name == AUTO and not stated[i]]
        if self._classifier is None:
            return told
        for start in range(0, len(open_places), batch_size):
            places = open_places[start : start + batch_size]
            padded = places + places[-1:] * (min(power_of_two(len(places)), batch_size) - len(places))
            probabilities = self._classifier(
                self.params,
                image=np.stack([canvases[i][0] for i in padded]),
                image_size=np.array([canvases[i][1] for i in padded], np.int32),
            )
            for i, of_image in zip(places, np.asarray(probabilities), strict=False):
                told[i] = MODALITIES[int(of_image.argmax())], float(of_image.max())
        return told

    def _detect(
        self,
        pixels: list[np.ndarray],
        canvases: list[Any],
        asked: list[list[str]],
        modalities: list[str],
        batch_size: int,
    ) -> list[Detections]:
        """Runs every pair of image and prompt, and joins them by image."""
        max_tokens, prefixed = self.config.data.max_tokens, self.config.evaluation.modality_prefix
        chunks = [
            build_prompts(names, self.tokenizer, max_tokens, make_prefix(modality) if prefixed else "")
            for names, modality in zip(asked, modalities, strict=True)
        ]
        pairs = [(image, prompt) for image, prompts in enumerate(chunks) for prompt, _ in prompts]
        rows: list[dict[str, np.ndarray]] = []
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            padded = batch + batch[-1:] * (min(power_of_two(len(batch)), batch_size) - len(batch))
            options = {}
            if self.config.model.modality.names:
                ids = [MODALITIES.index(modalities[image]) for image, _ in padded]
                options["modality"] = np.array(ids, np.int32)
            found = self._detector(
                self.params,
                **options,
                image=np.stack([canvases[image][0] for image, _ in padded]),
                image_size=np.array([canvases[image][1] for image, _ in padded], np.int32),
                **stack_prompts([prompt for _, prompt in padded], max_tokens, self.config.detection),
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


def _describe_modality(prediction: Prediction, listed: str) -> str:
    """Returns what a person must know of the modality, for a model that has parts of some (`listed`)."""
    if not listed:
        return ""
    told = "" if prediction.probability is None else f", classified with probability {prediction.probability:.2f}"
    has_parts = prediction.modality in [name.strip() for name in listed.split(",")]
    return f" ({prediction.modality}{told}{'' if has_parts else ', with the shared parts of the model'})"


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
        "modality": prediction.modality,
        "modality_probability": prediction.probability,
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
    add("--masks", metavar="FILE", help="label map to write of the volume: .nii.gz; of a series also .dcm (DICOM-SEG)")
    add("--plane", choices=PLANE_CHOICES, default="auto", help="slices of the volume to look at; default: as scanned")
    add("--window", choices=WINDOW_CHOICES, default="auto", help="values of the volume that become black and white")
    add("--phrases", required=True, help="what to look for, as 'left lung. nodule'")
    add("--out", metavar="FILE", help="image file to draw the boxes into")
    add("--json", metavar="FILE", help="file to write the boxes to, in pixels of each image: x0 y0 x1 y1, half-open")
    add("--threshold", type=float, default=0.3, help="least score of a box; default: %(default)s")
    add("--max-detections", type=int, help="most boxes of an image; default: as the model was configured")
    add("--modality", default=AUTO, metavar="NAME", help="of the images; default: what the file or the model says")
    add("--modality-prefix", action="store_true", help="begin prompts with it, as 'CT: ', whatever the recipe says")
    add("--no-ema", action="store_true", help="use the parameters themselves instead of their running average")
    add_option(parser)
    options = parser.parse_args(argv)
    if bool(options.image) == bool(options.volume) or bool(options.volume) != bool(options.masks):
        raise ValueError("give --image FILE ..., or --volume PATH with --masks FILE")

    keep_compiled(options.compilation_cache)
    model = MedGLIP.from_pretrained(options.checkpoint, use_ema=False if options.no_ema else None)
    model.config.evaluation.modality_prefix |= options.modality_prefix
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
        options.image,
        options.phrases,
        threshold=options.threshold,
        max_detections=options.max_detections,
        modality=options.modality,
    )
    listed = model.config.model.modality.names
    for path, prediction in zip(options.image, predictions, strict=True):
        print(f"{path}: {len(prediction)} boxes{_describe_modality(prediction, listed)}")
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
