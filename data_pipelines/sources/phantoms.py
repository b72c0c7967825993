"""Phantoms: procedural medical images with every region known, endless, seeded and deterministic by index.

They are the embedded default of the project and its test bed. The same shape means different phrases by side and place
(left and right lung, kidney, ventricle; nasal and temporal retina), half of the images have no lesion, and each has
things that look like one and are none, so that a model must read both image and phrase.

    example = phantom(7, modality="ct")
    examples = Phantoms(1000, seed=1, size=256)
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import cv2
import numpy as np

from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.sources import phantom_photography as photography
from data_pipelines.sources import phantom_radiology as radiology
from data_pipelines.sources import phantom_ultrasound as ultrasound
from data_pipelines.sources.phantom_shapes import Color, Scene

DATASET = "phantoms"
LEAST_SIZE = 64  # pixels: below it lesions are no longer visible


@dataclasses.dataclass(frozen=True)
class _View:
    """One way to paint a modality.

    Attributes:
        paint: fills a scene, given the lesions to draw.
        lesions: what an expert would look for here; those not drawn are the example's `absent`.
        background: grey value or RGB of the empty picture.
        turn, shift, warp: largest rotation (radians), shift and deformation (scene units) of the pose.
        gamma: range of the random exposure.
    """

    paint: Callable[[Scene, tuple[str, ...]], None]
    lesions: tuple[str, ...]
    background: Color
    turn: float = 0.1
    shift: float = 0.06
    warp: float = 0.03
    gamma: tuple[float, float] = (0.8, 1.25)


KINDS: dict[str, tuple[_View, ...]] = {
    "xray": (_View(radiology.chest_xray, radiology.XRAY_LESIONS, 0.05),),
    "ct": (_View(radiology.abdominal_ct, radiology.CT_LESIONS, 0.0),),
    "mri": (_View(radiology.brain_mri, radiology.MRI_LESIONS, 0.0, turn=0.2),),
    "ultrasound": (
        _View(ultrasound.four_chambers, ultrasound.HEART_LESIONS, 0.25, turn=0.15),
        _View(ultrasound.liver_view, ultrasound.LIVER_LESIONS, 0.25, turn=0.15),
    ),
    "fundus": (_View(photography.fundus, photography.FUNDUS_LESIONS, (0.01, 0.01, 0.01), warp=0.015),),
    "microscopy": (_View(photography.blood_smear, photography.SMEAR_LESIONS, (0.92, 0.89, 0.9), turn=3.14, warp=0.02),),
    "endoscopy": (_View(photography.colonoscopy, photography.ENDOSCOPY_LESIONS, (0.02, 0.02, 0.02)),),
    "dermoscopy": (_View(photography.dermoscopy, photography.DERMOSCOPY_LESIONS, (0.05, 0.04, 0.04)),),
}


def phantom(index: int, *, seed: int = 0, size: int = 256, modality: str | None = None) -> GroundingExample:
    """Draws one annotated image; the same arguments give the same example in any process.

    Args:
        index: which one of the endless series, 0 or more.
        seed: which series, 0 or more.
        size: side of the square image in pixels, at least `LEAST_SIZE`.
        modality: one of `KINDS`; None goes through them in turn.

    Returns:
        An example whose image is a PNG (grey for radiology, else RGB) and whose regions all have masks. A region holds
        its visible part and whatever lies over it. `absent` names the lesions that were looked for and are not there.

    Raises:
        ValueError: a negative index or seed, a size that is too small, or a modality without phantoms.
    """
    _check(index, seed, size, modality)
    modality = modality or list(KINDS)[index % len(KINDS)]
    rng = np.random.Generator(np.random.PCG64([seed, index, size, MODALITIES.index(modality)]))
    view = KINDS[modality][rng.integers(len(KINDS[modality]))]
    scene = Scene(rng, size, view.background, turn=view.turn, shift=view.shift, warp=view.warp)
    view.paint(scene, scene.draw_lesions(view.lesions))
    found = {region.label for region in scene.regions}
    return GroundingExample(
        image=_encode(scene, view.gamma),
        image_id=f"{DATASET}-{modality}-{size}-{seed}-{index}",
        dataset=DATASET,
        height=size,
        width=size,
        modality=modality,
        regions=tuple(scene.regions),
        absent=tuple(label for label in view.lesions if label not in found),
    )


class Phantoms(Sequence[GroundingExample]):
    """The first `count` phantoms of a series, drawn when asked for.

    Args:
        count: how many.
        seed: which series.
        size: side of the images in pixels.
        modality: one of `KINDS`, or several to go through in turn; None goes through all of them.
        start: index of the first.

    Raises:
        ValueError: a negative count, or an argument that `phantom` does not take.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        size: int = 256,
        modality: str | Sequence[str] | None = None,
        start: int = 0,
    ):
        if count < 0:
            raise ValueError(f"phantom count must be 0 or more, not {count}")
        self._modalities = (modality,) if isinstance(modality, str) else tuple(KINDS if modality is None else modality)
        if not self._modalities:
            raise ValueError(f"no modality to draw: give some of {', '.join(KINDS)}")
        for name in self._modalities:
            _check(start, seed, size, name)
        self._indices = range(start, start + count)
        self._seed, self._size = seed, size

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> GroundingExample: ...

    @overload
    def __getitem__(self, index: slice) -> "Phantoms": ...

    def __getitem__(self, index: int | slice) -> "GroundingExample | Phantoms":
        if isinstance(index, slice):
            part = copy.copy(self)
            part._indices = self._indices[index]
            return part
        return self._draw(self._indices[index])

    def __iter__(self) -> Iterator[GroundingExample]:
        return map(self._draw, self._indices)

    def _draw(self, index: int) -> GroundingExample:
        modality = self._modalities[index % len(self._modalities)]
        return phantom(index, seed=self._seed, size=self._size, modality=modality)


def _check(index: int, seed: int, size: int, modality: str | None) -> None:
    if index < 0 or seed < 0:
        raise ValueError(f"phantom index and seed must be 0 or more, not index={index}, seed={seed}")
    if size < LEAST_SIZE:
        raise ValueError(f"phantom size must be at least {LEAST_SIZE} pixels, not {size}")
    if modality is not None and modality not in KINDS:
        raise ValueError(f"there is no phantom of modality {modality!r}; there are {', '.join(KINDS)}")


def _encode(scene: Scene, gamma: tuple[float, float]) -> bytes:
    """Exposes the picture and returns it as PNG: the fast settings, since noise does not compress anyway."""
    exposure = np.linspace(0, 1, 256) ** scene.between(*gamma) * 255
    np.maximum(scene.image, 0, out=scene.image)
    planes = [cv2.convertScaleAbs(plane, alpha=255) for plane in scene.image[::-1]]  # cv2 stores BGR
    pixels = cv2.LUT(cv2.merge(planes), np.rint(exposure).astype(np.uint8))
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    options += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    return cv2.imencode(".png", pixels, options)[1].tobytes()
