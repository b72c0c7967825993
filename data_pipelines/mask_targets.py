"""Masks of a training example: which boxes and phrases of its prompt have one, on the grid of every fourth pixel.

A cell of the grid is in a mask where the mask covers at least half of it after the image's own resizing; of a structure
so small that it covers half of no cell, the cells that it covers most are. So no mask that has a pixel is lost.

A phrase has a mask where all boxes that it means have one: the union of theirs. A phrase of the prompt that means no
box is known to be absent, and its mask is empty. A phrase of which only some boxes have masks is left out, and so are
all phrases of an image whose regions have none, or of which some region is a crowd. A phrase that some box may show
too, by `config.data.hierarchy.ignored`, is left out as well: nobody says which pixels it means.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from data_pipelines.prompts import Prompt
from data_pipelines.schema import Region

MASK_STRIDE = 4  # canvas pixels of a cell's side

_HALF = 127.5  # of 255: a cell that is half covered
_ABSENT_SHARE = 0.25  # of the phrases of an image, at least, where so many absent ones are known


def grid_size(canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns rows and columns of the cells that cover a canvas of (H, W) pixels."""
    return -(-canvas[0] // MASK_STRIDE), -(-canvas[1] // MASK_STRIDE)


def packed_size(canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns rows and bytes a row of a packed mask of a canvas; see `pack`."""
    rows, columns = grid_size(canvas)
    return rows, -(-columns // 8)


def pack(masks: np.ndarray) -> np.ndarray:
    """Packs bool[..., h, w] into uint8[..., h, ceil(w / 8)]; the first column of eight is the highest bit."""
    return np.packbits(masks, axis=-1)


def decode_mask(mask: Mapping[str, Any]) -> np.ndarray:
    """Decodes a compressed COCO run-length encoding to uint8[h, w] of 0 and 1."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(mask)  # pyright: ignore[reportArgumentType]


def resize_mask(mask: np.ndarray, size: tuple[int, int], canvas: tuple[int, int], flip: bool = False) -> np.ndarray:
    """Takes a mask the way of its image through `transforms.resize_into`, and onto the grid.

    Args:
        mask: uint8[h, w] of 0 and 1.
        size: (height, width) that the image takes in the canvas, in pixels.
        canvas: (H, W) in pixels.
        flip: mirror it, from left to right.

    Returns:
        bool[ceil(H / 4), ceil(W / 4)]; False only where the mask has no pixel, see the module.
    """
    rows, columns = grid_size(canvas)
    covered = np.zeros((rows * MASK_STRIDE, columns * MASK_STRIDE), np.uint8)
    if size == mask.shape:
        resized = mask * np.uint8(255)
    else:
        interpolation = cv2.INTER_AREA if size[0] < mask.shape[0] else cv2.INTER_LINEAR  # as the image's pixels
        resized = cv2.resize(mask * np.uint8(255), size[::-1], interpolation=interpolation)
    covered[: size[0], : size[1]] = resized[:, ::-1] if flip else resized
    share = cv2.resize(covered, (columns, rows), interpolation=cv2.INTER_AREA)  # means of 4 x 4 pixels
    most = share.max()
    if most == 0:  # under 1 / 255 of a cell, or nothing: the cells that its pixels lie in
        y, x = np.nonzero(mask[:, ::-1] if flip else mask)
        scale = np.divide(size, mask.shape) / MASK_STRIDE
        share[((y + 0.5) * scale[0]).astype(int), ((x + 0.5) * scale[1]).astype(int)] = most = 1
    return (share >= min(_HALF, float(most))) & (share > 0)


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """How the masks of an example are chosen and laid out.

    Attributes:
        max_masks: K, most boxes, and most phrases, of an image that have one in the batch; `config.data.max_masks`.
        canvas: (H, W) in pixels.
    """

    max_masks: int
    canvas: tuple[int, int]

    def __post_init__(self) -> None:
        if self.max_masks < 1:
            raise ValueError(f"config.data.max_masks is {self.max_masks}: it must be 0 (off) or more")

    def make(
        self,
        regions: Sequence[Region],
        masks: Sequence[Mapping[str, Any] | None],
        prompt: Prompt,
        rng: np.random.Generator,
        *,
        size: tuple[int, int],
        flip: bool,
        annotated: bool,
        crowds: bool,
        ignored: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the mask arrays of one row of the batch; see `loader.train_loader`.

        Args:
            regions: the prompt's M boxes.
            masks: of each, the run lengths in the image as it is stored, not mirrored; None where there is none.
            prompt: with a row of the positive map for each box.
            rng: chooses, where there are more than K.
            size: (height, width) that the image takes in the canvas.
            flip: whether it is mirrored in it.
            annotated: whether the image is normal, or any of its regions has a mask: one that has boxes only says
                nothing of phrases.
            crowds: whether some region of the image is a crowd.
            ignored: bool[M, L], the tokens that carry no loss for a box; see `hierarchy.find_ignored`.
        """
        most, length = self.max_masks, len(prompt.input_ids)
        packed = packed_size(self.canvas)
        known = [i for i, mask in enumerate(masks) if mask is not None]
        meant = self._find_meant(prompt, len(regions), ignored) if annotated and not crowds else []
        sound = [(tokens, boxes) for tokens, boxes in meant if all(masks[i] is not None for i in boxes)]
        present = [pair for pair in sound if pair[1]]
        absent = [pair for pair in sound if not pair[1]]
        present = [present[i] for i in rng.permutation(len(present))]
        absent = [absent[i] for i in rng.permutation(len(absent))]
        present = present[: most - min(len(absent), int(_ABSENT_SHARE * most))]
        phrases = (present + absent)[:most]
        chosen = sorted(rng.permutation(known)[:most].tolist())

        needed = {*chosen, *(i for _, boxes in phrases for i in boxes)}
        grids = {
            i: resize_mask(decode_mask(mask), size, self.canvas, flip)
            for i in sorted(needed)
            if (mask := masks[i]) is not None
        }
        row = {
            "masks": np.zeros((most, *packed), np.uint8),
            "mask_boxes": np.full(most, -1, np.int32),
            "phrase_masks": np.zeros((most, *packed), np.uint8),
            "phrase_tokens": np.zeros((most, length), bool),
        }
        chosen = [i for i in chosen if grids[i].any()]  # run lengths of no pixel teach nothing
        for place, i in enumerate(chosen):
            row["masks"][place], row["mask_boxes"][place] = pack(grids[i]), i
        phrases = [(tokens, boxes) for tokens, boxes in phrases if all(grids[i].any() for i in boxes)]
        for place, (tokens, boxes) in enumerate(phrases):
            row["phrase_tokens"][place, tokens] = True
            if boxes:
                row["phrase_masks"][place] = pack(np.logical_or.reduce([grids[i] for i in boxes]))
        return row

    @staticmethod
    def _find_meant(prompt: Prompt, count: int, ignored: np.ndarray | None) -> list[tuple[np.ndarray, list[int]]]:
        """Returns the tokens of each phrase that no box ignores, and the boxes whose words hold all of them."""
        words = prompt.positive_map[:count] > 0  # [M, L]
        found = []
        for ranges in prompt.ranges:
            tokens = np.concatenate([np.arange(first, last) for first, last in ranges])
            if ignored is not None and ignored[:count, tokens].all(axis=1).any():
                continue
            found.append((tokens, np.flatnonzero(words[:, tokens].all(axis=1)).tolist()))
        return found
