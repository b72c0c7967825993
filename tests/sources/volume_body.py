"""A small body that the tests of volume sources store in different formats."""

import numpy as np
from nibabel import orientations

# 96 x 90 x 100 mm, [right, front, head] (RAS+). The liver is on the patient's right.
SHAPE, SPACING, ORIGIN = (32, 45, 20), (3.0, 2.0, 5.0), (-48, 12, -300)
NAMES = {1: "liver", 2: "spleen", 3: "vertebrae", 4: "liver_tumor"}


def draw_body() -> tuple[np.ndarray, np.ndarray]:
    """Returns Hounsfield units int16 and labels uint8, in RAS+."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[18:29, 15:40, 4:16] = 1
    labels[3:9, 10:25, 5:14] = 2
    labels[13:18, 3:11, :] = 3
    labels[20:23, 20:24, 6:10] = labels[25:27, 30:34, 7:9] = 4
    density = np.asarray([-900, 60, 45, 700, 20])[labels]
    return (density + np.random.default_rng(0).integers(-9, 9, SHAPE)).astype(np.int16), labels


def affine_of() -> np.ndarray:
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = ORIGIN
    return affine


def turn_to(codes: str, values: np.ndarray, affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns a RAS+ volume with its axes in other directions ("LPS"), and the affine that says so."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    affine = (affine_of() if affine is None else affine) @ orientations.inv_ornt_aff(turn, values.shape[:3])
    return orientations.apply_orientation(values, turn), affine


def facts(example) -> tuple:
    """What must be the same however the body is stored; the case in the image id may differ."""
    regions = [(region.phrase, region.label, region.box.tolist(), region.mask) for region in example.regions]
    return example.image_id.split("/", 1)[1], example.image, example.spacing_mm, example.modality, regions
