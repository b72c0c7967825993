"""Whether left and right are where radiologists hang them: the patient's left on the picture's right."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.conflicts.structures import find_key, find_mirrored, find_side, remove_side
from data_pipelines.schema import GroundingExample, Region

_HUNG = ("xray", "ct", "mri", "pet")  # modalities with a fixed side
_MOST_OVERLAP = 0.25  # of the narrower of two sides' boxes, across the picture; more, and it is a view from the side

# Structures of the back and what lies before them: in a picture that shows the back above them is upside down.
_BEFORE = {
    "autochthon": {"aorta", "inferior_vena_cava", "heart", "liver", "stomach"},
    "gluteus_maximus": {"hip"},
}


def _frame(boxes: np.ndarray) -> np.ndarray:
    """The box float64[4] around boxes [K, 4]."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _compare(left: np.ndarray, right: np.ndarray) -> int:
    """1 where the left one lies on the picture's right, -1 where on its left, 0 where that cannot be told."""
    across, down = (left[:2] + left[2:] - right[:2] - right[2:]) / 2
    shared = min(left[2], right[2]) - max(left[0], right[0])
    narrower = min(left[2] - left[0], right[2] - right[0])
    if abs(across) <= abs(down) or shared > _MOST_OVERLAP * narrower:
        return 0
    return 1 if across > 0 else -1


def _is_upside_down(boxes: np.ndarray, names: Sequence[str]) -> bool:
    """Whether muscles of the back lie above what is before them, as in slices that a file format turned over."""
    for back, before in _BEFORE.items():
        behind = boxes[[name == back for name in names]]
        ahead = boxes[[name in before for name in names]]
        if not len(behind) or not len(ahead):
            continue
        low, high = _frame(behind), _frame(ahead)
        # Seen from the front the long muscles of the back are taller than wide.
        if low[2] - low[0] > low[3] - low[1] and low[3] < (high[1] + high[3]) / 2:
            return True
    return False


def find_swapped(example: GroundingExample, regions: Sequence[Region]) -> tuple[list[int], str]:
    """Finds regions whose side contradicts the picture.

    Evidence are structures that are shown on both sides, one clearly beside the other. Where all of them are on the
    wrong side, the whole picture is taken for mirrored, and all sided regions are returned; else the wrong pairs. A
    picture turned by half, upside down and with the left on the left, is right in itself. One-sided structures alone,
    sagittal slices, modalities without a fixed side, pictures turned by a quarter and the heart's chambers say nothing.

    Returns:
        (positions of regions, what was seen).
    """
    if example.modality not in _HUNG or "/sagittal/" in f"/{example.image_id}":
        return [], ""
    sides: dict[str, list[int]] = {}
    for k, region in enumerate(regions):
        if find_side(region.label):
            sides.setdefault(find_key(region.label), []).append(k)
    pairs = [(key, find_mirrored(key)) for key in sides if find_side(key) == "left" and find_mirrored(key) in sides]
    if not pairs:
        return [], ""
    boxes = np.asarray([region.box for region in regions], np.float64)
    votes = {pair: _compare(_frame(boxes[sides[pair[0]]]), _frame(boxes[sides[pair[1]]])) for pair in pairs}
    if not any(votes.values()):
        return [], ""
    names = [remove_side(find_key(region.label)) for region in regions]
    turned = _is_upside_down(boxes, names)
    wrong = [pair for pair, vote in votes.items() if vote == (1 if turned else -1)]
    if not wrong:
        return [], ""
    seen = ", ".join(f"{left} on the picture's {'right' if turned else 'left'}" for left, _ in wrong[:3])
    seen += " of a picture that is upside down" if turned else ""
    if len(wrong) == sum(map(bool, votes.values())):
        return sorted(k for positions in sides.values() for k in positions), f"{seen}: mirrored"
    return sorted(k for pair in wrong for key in pair for k in sides[key]), seen
