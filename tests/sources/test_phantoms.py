import collections
import functools
import hashlib
import itertools
import pickle
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources import phantoms
from data_pipelines.sources.phantoms import KINDS, LEAST_SIZE, Phantoms, phantom
from data_pipelines.taxonomy import load_taxonomy

MODALITIES = ("xray", "ct", "mri", "ultrasound", "fundus", "microscopy", "endoscopy", "dermoscopy")
GRAY = ("xray", "ct", "mri", "ultrasound")
COUNT, SIZE = 60, 128

# Labels that only side or place tells apart.
LOOKALIKES = {
    "xray": ("left_lung", "right_lung"),
    "ct": ("left_kidney", "right_kidney"),
    "mri": ("left_cerebral_hemisphere", "right_cerebral_hemisphere"),
    "ultrasound": ("left_atrium", "right_atrium"),
    "fundus": ("nasal_retina", "temporal_retina"),
}

each_modality = pytest.mark.parametrize("modality", MODALITIES)


@functools.cache
def drawn(modality: str) -> tuple[GroundingExample, ...]:
    return tuple(Phantoms(COUNT, size=SIZE, modality=modality))


def fingerprint(example: GroundingExample) -> str:
    """Returns a digest of everything in an example."""
    content = hashlib.sha256(example.image)
    facts = (example.image_id, example.dataset, example.modality, example.height, example.width, example.absent)
    content.update(repr(facts).encode())
    for region in example.regions:
        facts = (region.box.tolist(), region.phrase, region.label, region.granularity, region.parent, region.mask)
        content.update(repr(facts).encode())
    return content.hexdigest()


def pixels(example: GroundingExample) -> np.ndarray:
    """Returns uint8[H, W] or uint8[H, W, 3]."""
    return cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_UNCHANGED)


def mask_of(region: Region) -> np.ndarray:
    return coco_mask.decode(region.mask).astype(bool)


def masks_of(example: GroundingExample, label: str) -> list[np.ndarray]:
    return [mask_of(region) for region in example.regions if region.label == label]


def lesions_of(example: GroundingExample) -> list[Region]:
    return [region for region in example.regions if region.granularity == "lesion"]


def middle(example: GroundingExample, label: str) -> float | None:
    """Returns x of the middle of the only region of this label, None where there is none."""
    boxes = [region.box for region in example.regions if region.label == label]
    assert len(boxes) <= 1, f"{len(boxes)} regions of {label}"
    return (boxes[0][0] + boxes[0][2]) / 2 if boxes else None


def test_all_kinds_come_in_turn():
    assert tuple(KINDS) == MODALITIES
    assert [phantom(index, size=LEAST_SIZE).modality for index in range(16)] == [*MODALITIES, *MODALITIES]


@each_modality
def test_same_arguments_give_the_same_example(modality):
    for index in range(3):
        first, again = (phantom(index, seed=4, size=80, modality=modality) for _ in range(2))
        assert fingerprint(first) == fingerprint(again)


def test_another_process_draws_the_same_in_another_order():
    script = (
        "import runpy, sys; from data_pipelines.sources.phantoms import phantom\n"
        "fingerprint = runpy.run_path(sys.argv[1])['fingerprint']\n"
        "print([fingerprint(phantom(i, seed=2, size=96)) for i in range(15, -1, -1)][::-1])"
    )
    command = [sys.executable, "-c", script, __file__]
    there = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert there == str([fingerprint(phantom(index, seed=2, size=96)) for index in range(16)])


def test_every_index_seed_size_and_modality_is_another_image():
    examples = [
        phantom(index, seed=seed, size=size, modality=modality)
        for index, seed, size, modality in itertools.product((0, 1, 10**12), (0, 1), (64, 72), MODALITIES)
    ]
    assert len({example.image for example in examples}) == len(examples)
    assert len({example.image_id for example in examples}) == len(examples)


@pytest.mark.parametrize("modality", [modality for modality in MODALITIES if modality != "dermoscopy"])
def test_another_index_seed_or_size_is_another_scene(modality):
    """Not only the noise differs: the first region lies elsewhere, by more than a pixel of the smaller picture."""
    places = [
        phantom(index, seed=seed, size=size, modality=modality).regions[0].box / size
        for index, seed, size in itertools.product((0, 1), (0, 1), (64, 128))
    ]
    moves = [np.abs(one - other).max() for one, other in itertools.combinations(places, 2)]
    assert np.median(moves) > 0.03
    assert sum(move < 1 / 64 for move in moves) < len(moves) / 8


def test_global_random_state_is_neither_read_nor_written():
    drawings = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        states = repr((random.getstate(), np.random.get_state()))  # noqa: NPY002
        drawings.append([fingerprint(phantom(index, size=LEAST_SIZE)) for index in range(8)])
        assert repr((random.getstate(), np.random.get_state())) == states  # noqa: NPY002
    assert drawings[0] == drawings[1]


@each_modality
def test_image_is_a_png_of_the_size_asked_for(modality):
    for size in (LEAST_SIZE, 101):
        example = phantom(3, size=size, modality=modality)
        assert example.image.startswith(b"\x89PNG")
        image = pixels(example)
        assert image.shape == ((size, size) if modality in GRAY else (size, size, 3))
        assert image.dtype == np.uint8
        assert (example.height, example.width, example.modality, example.dataset) == (size, size, modality, "phantoms")


@each_modality
def test_boxes_are_tight_on_masks(modality):
    for example in drawn(modality):
        assert example.regions
        for region in example.regions:
            mask = mask_of(region)
            assert mask.shape == (SIZE, SIZE)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            np.testing.assert_array_equal(region.box, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert region.box.dtype == np.float32


@each_modality
def test_regions_are_what_the_taxonomy_says(modality):
    taxonomy = load_taxonomy()
    for region in itertools.chain.from_iterable(example.regions for example in drawn(modality)):
        entry = taxonomy.labels[region.label]
        assert (region.phrase, region.granularity) == (entry.name, entry.granularity)
        assert modality in entry.modalities
        if region.label == "pigment_globule":  # of a kind of skin lesion
            assert region.parent in ("melanoma", "nevus")
        elif region.parent != entry.parent:  # then the parent is narrower: a side, a chamber
            assert entry.parent in taxonomy.ancestors(region.parent)


@each_modality
def test_regions_lie_in_their_parent(modality):
    checked = 0
    for example in drawn(modality):
        for region in example.regions:
            if parents := masks_of(example, region.parent):
                mask = mask_of(region)
                within = np.count_nonzero(mask & np.any(parents, 0)) / np.count_nonzero(mask)
                assert within == 1 if region.granularity == "lesion" else within > 0.95, (
                    region.label,
                    example.image_id,
                )
                checked += 1
    assert checked > COUNT / 3


@each_modality
def test_no_lesion_hides_another(modality):
    for example in drawn(modality):
        for one, other in itertools.combinations(lesions_of(example), 2):
            if other.parent != one.label:
                assert not (mask_of(one) & mask_of(other)).any(), example.image_id


def test_every_cell_can_be_seen():
    """Cells lie over one another in the order of the regions: red ones, platelets, white ones."""
    order = ("red_blood_cell", "platelet", "white_blood_cell")
    for example in drawn("microscopy"):
        cells = [region for region in example.regions if region.label in order]
        assert [order.index(cell.label) for cell in cells] == sorted(order.index(cell.label) for cell in cells)
        for k, cell in enumerate(cells):
            mask = mask_of(cell)
            later = np.any([mask_of(other) for other in cells[k + 1 :]] or [np.zeros_like(mask)], 0)
            assert np.count_nonzero(mask & ~later) > 0.4 * np.count_nonzero(mask), example.image_id


@pytest.mark.parametrize("modality", ["xray", "ct", "mri", "ultrasound"])
def test_patients_left_is_on_the_images_right(modality):
    labels = {region.label for example in drawn(modality) for region in example.regions}
    pairs = {label: label.replace("left_", "right_") for label in labels if label.startswith("left_")}
    assert pairs
    for left, right in pairs.items():
        places = [(middle(example, left), middle(example, right)) for example in drawn(modality)]
        both = [(x, y) for x, y in places if x is not None and y is not None]
        assert len(both) > COUNT / 3
        assert all(x > y for x, y in both), left


def test_disc_and_nose_are_on_the_side_of_the_eye():
    eyes = collections.Counter()
    for example in drawn("fundus"):
        left, right = (middle(example, f"{side}_retina") for side in ("left", "right"))
        assert (left is None) != (right is None)
        toward_nose = 1 if left is None else -1  # the right eye has its nose on the image's right
        for label, sign in (("optic_disc", 1), ("nasal_retina", 1), ("temporal_retina", -1)):
            assert (middle(example, label) - middle(example, "fovea")) * toward_nose * sign > 0, example.image_id
        eyes[toward_nose] += 1
    assert min(eyes[1], eyes[-1]) > COUNT / 4


@pytest.mark.parametrize("modality", LOOKALIKES)
def test_shapes_that_look_alike_have_different_phrases(modality):
    """The mirror image of one region, enlarged to the other's box, nearly covers the other."""
    one, other = LOOKALIKES[modality]
    overlaps = []
    for example in drawn(modality):
        found = {region.label: region for region in example.regions if region.label in (one, other)}
        if len(found) == 2:
            boxes = [found[label].box.astype(int) for label in (one, other)]
            crops = [
                mask_of(found[label])[b[1] : b[3], b[0] : b[2]] for label, b in zip((one, other), boxes, strict=True)
            ]
            mirrored = cv2.resize(crops[0][:, ::-1].astype(np.uint8), crops[1].shape[::-1]).astype(bool)
            overlaps.append(np.sum(mirrored & crops[1]) / np.sum(mirrored | crops[1]))
            assert found[one].phrase != found[other].phrase
    assert len(overlaps) > COUNT / 3
    assert np.median(overlaps) > 0.7


@each_modality
def test_about_half_of_the_images_have_no_lesion(modality):
    healthy = sum(not lesions_of(example) for example in drawn(modality))
    assert 0.35 * COUNT <= healthy <= 0.65 * COUNT


@each_modality
def test_absent_lesions_are_those_looked_for_and_not_drawn(modality):
    labels = load_taxonomy().labels
    looked_for = set()
    for example in drawn(modality):
        shown = {region.label for region in lesions_of(example)}
        assert shown.isdisjoint(example.absent)
        assert all(labels[label].granularity == "lesion" for label in example.absent)
        assert {*shown - {"tumor_core"}, *example.absent} in [set(view.lesions) for view in KINDS[modality]]
        looked_for |= shown
    assert looked_for - {"tumor_core"} == {lesion for view in KINDS[modality] for lesion in view.lesions}


@each_modality
def test_every_organ_has_texture(modality):
    """How far a pixel is from the mean of its neighbours, away from the region's edge: smooth shades do not count."""
    checked = 0
    for example in drawn(modality)[:20]:
        image = pixels(example).reshape(SIZE, SIZE, -1).mean(2)
        grain = np.abs(image[:, 1:-1] - (image[:, :-2] + image[:, 2:]) / 2)
        for region in example.regions:
            if region.granularity in ("region", "organ", "substructure", "cell"):
                inside = cv2.erode(mask_of(region).astype(np.uint8), np.ones((5, 5), np.uint8))[:, 1:-1].astype(bool)
                if inside.sum() >= 20:
                    assert grain[inside].mean() > 1, (region.label, example.image_id)
                    checked += 1
    assert checked >= 20


def test_ultrasound_regions_end_with_the_sector():
    for example in drawn("ultrasound"):
        image = pixels(example)
        for region in example.regions:
            mask = mask_of(region)
            black = np.count_nonzero(cv2.blur(image, (7, 7))[mask] == 0)
            assert black < 0.02 * np.count_nonzero(mask), (region.label, example.image_id)


@each_modality
def test_smallest_pictures_still_show_lesions(modality):
    examples = Phantoms(16, size=LEAST_SIZE, modality=modality)
    assert all(region.box[2] <= LEAST_SIZE >= region.box[3] for example in examples for region in example.regions)
    assert any(lesions_of(example) for example in examples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "0 or more, not index=-1"),
        ({"index": 0, "seed": -2}, "seed=-2"),
        ({"index": 0, "size": LEAST_SIZE - 1}, f"at least {LEAST_SIZE} pixels, not {LEAST_SIZE - 1}"),
        ({"index": 0, "modality": "pet"}, "no phantom of modality 'pet'; there are xray, ct"),
        ({"index": 0, "modality": ""}, "no phantom of modality ''"),
    ],
)
def test_bad_arguments_are_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        phantom(**arguments)
    with pytest.raises(ValueError, match=message):  # before anything is drawn
        Phantoms(1, start=arguments.pop("index"), **arguments)


def test_negative_count_is_an_error():
    with pytest.raises(ValueError, match="count must be 0 or more, not -1"):
        Phantoms(-1)


def test_phantoms_are_a_sequence():
    series = Phantoms(10, seed=3, size=LEAST_SIZE, start=5)
    expected = [fingerprint(phantom(index, seed=3, size=LEAST_SIZE)) for index in range(5, 15)]
    assert len(series) == 10
    assert [fingerprint(example) for example in series] == expected
    assert [fingerprint(series[position]) for position in (0, 9, -1)] == [expected[0], expected[9], expected[9]]
    for part in (slice(2, 5), slice(None, None, -3), slice(8, 100), slice(4, 4)):
        assert [fingerprint(example) for example in series[part]] == expected[part]
    assert fingerprint(series[1:][2:][0]) == expected[3]
    assert fingerprint(pickle.loads(pickle.dumps(series))[4]) == expected[4]
    for position in (10, -11):
        with pytest.raises(IndexError):
            series[position]


def test_slices_are_not_drawn_before_they_are_used(monkeypatch):
    series = Phantoms(10**9, size=LEAST_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(phantoms, "phantom", lambda *_, **__: pytest.fail("drawn"))
        tail = series[500:600]
        assert len(tail) == 100
    assert tail[0].image_id == phantom(500, size=LEAST_SIZE).image_id
