"""Does the exported PyTorch model find what this one finds? The same images and phrases through both."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

BOX_BOUND = 0.05  # pixels of the image as it was given
SCORE_BOUND = 1e-4


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far the detections of two models are from each other.

    Attributes:
        images: how many were looked at.
        detections: how many this model found in them.
        unmatched: detections, of either model, of which the other has none of the phrase.
        box_error: largest difference of a corner, in pixels of the image.
        score_error: largest difference of a score.
        source: where the images came from, and what looked at them.
    """

    images: int
    detections: int
    unmatched: int
    box_error: float
    score_error: float
    source: str

    @property
    def holds(self) -> bool:
        """Whether both models find the same: boxes to 0.05 pixels, scores to 1e-4, and something at all."""
        close = self.box_error <= BOX_BOUND and self.score_error <= SCORE_BOUND
        return close and self.unmatched == 0 and self.detections > 0

    def describe(self) -> str:
        """Returns the figures in a line."""
        return (
            f"{self.detections} detections in {self.images} images ({self.source}): boxes to {self.box_error:.1e} "
            f"pixels, scores to {self.score_error:.1e}, {self.unmatched} without a partner"
        )


def match_detections(
    boxes: np.ndarray, scores: np.ndarray, phrases: Sequence[str], others: tuple[np.ndarray, np.ndarray, Sequence[str]]
) -> tuple[int, float, float]:
    """Pairs the detections of an image with those of another model, by phrase and nearest box.

    Two models that differ in the last bits order equal scores differently, so places do not count.

    Args:
        boxes, scores, phrases: float[n, 4], float[n] and n phrases.
        others: the same of the other model.

    Returns:
        (unmatched, box_error, score_error): how many of both have no partner, and the largest differences of pairs.
    """
    other_boxes, other_scores, other_phrases = others
    free = np.ones(len(other_boxes), bool)
    names = np.asarray(other_phrases, dtype=object)
    unmatched, box_error, score_error = 0, 0.0, 0.0
    for box, score, phrase in zip(boxes, scores, phrases, strict=True):
        candidates = np.flatnonzero(free & (names == phrase))
        if not len(candidates):
            unmatched += 1
            continue
        # Two boxes of a phrase may coincide; of those as near, the one of the nearest score.
        distances = np.abs(other_boxes[candidates] - box).max(axis=1)
        differences = np.abs(other_scores[candidates] - score)
        nearest = np.lexsort((differences, np.round(distances, 3)))[0]
        free[candidates[nearest]] = False
        box_error = max(box_error, float(distances[nearest]))
        score_error = max(score_error, float(differences[nearest]))
    return unmatched + int(free.sum()), box_error, score_error


def require_torch() -> Any:
    """Returns the module torch.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ValueError("this needs PyTorch: install the extra `torch` (pip install 'medglip_jax[torch]')") from None
    return torch


def load_twin(folder: str | os.PathLike) -> tuple[Any, Any]:
    """Loads an exported folder as a stranger would, with Hugging Face's AutoModel and AutoProcessor.

    Raises:
        ValueError: PyTorch is not installed.
    """
    require_torch()
    from transformers import AutoModel, AutoProcessor

    path = os.fspath(folder)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True, local_files_only=True)


def compare_with_twin(
    found: Sequence[Any], twin: Any, processor: Any, images: Sequence[Any], phrases: Sequence[str], source: str
) -> Agreement:
    """Runs an exported model on the images that a model has looked at.

    Args:
        found: what `MedGLIP.predict` returned for each image at threshold 0.
        twin, processor: the exported model, from `load_twin`; or a stand-in for it, as `OnnxModel`.
        images: see `MedGLIP.predict`.
        phrases: what was looked for.
        source: what the images are and which model this is, for the report.
    """
    detections, unmatched, box_error, score_error = 0, 0, 0.0, 0.0
    for image, ours in zip(images, found, strict=True):
        theirs = processor.predict(twin, image, list(phrases), threshold=0.0)
        others = (np.asarray(theirs["boxes"]), np.asarray(theirs["scores"]), theirs["phrases"])
        without, box, score = match_detections(ours.boxes, ours.scores, ours.phrases, others)
        detections += len(ours)
        unmatched += without
        box_error, score_error = max(box_error, box), max(score_error, score)
    return Agreement(len(images), detections, unmatched, box_error, score_error, source)


def machine() -> str:
    """Returns the versions that a figure was measured with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers"))
    return f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, {packages}"
