import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data_pipelines import volumes
from data_pipelines.curate import SourceError
from data_pipelines.volumes import Grid, Labels, SliceRule

orientations = pytest.importorskip("nibabel.orientations")

SPACING = (2.0, 3.0, 4.0)  # mm toward right, front and head
ANATOMY = np.random.default_rng(0).integers(0, 1000, (5, 6, 7)).astype(np.int16)  # RAS
TURNS = [
    np.stack([order, signs], axis=1)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def store(values: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a RAS volume as another scanner would store it, and the affine that says so."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-40, 15, 7)
    return orientations.apply_orientation(values, turn), affine @ orientations.inv_ornt_aff(turn, values.shape)


def radiological(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Grid]:
    turn, grid = volumes.to_radiological(affine, values.shape, "file")
    return volumes.reorient(values, turn), grid


def grid_of(shape, spacing=(1.0, 1.0, 1.0)) -> Grid:
    return Grid(shape, np.diag([*spacing, 1.0]))


def labels_of(values: np.ndarray, **names: int) -> Labels:
    return Labels(values.shape, [values.astype(np.uint16)], {value: name for name, value in names.items()})


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: "".join(orientations.ornt2axcodes(turn)))
def test_same_anatomy_gives_the_same_picture_however_it_is_stored(turn):
    stored, affine = store(ANATOMY, turn)
    values, grid = radiological(stored, affine)
    expected = ANATOMY[::-1, ::-1, ::-1].transpose(2, 1, 0)  # right to left, front to back, head to feet
    np.testing.assert_array_equal(values, expected)
    assert grid.shape == (7, 6, 5)
    np.testing.assert_allclose(grid.spacing, SPACING[::-1])
    head_front_right = grid.affine @ (0, 0, 0, 1)
    np.testing.assert_allclose(head_front_right[:3], (-40 + 4 * 2, 15 + 5 * 3, 7 + 6 * 4))


@pytest.mark.parametrize(
    ("plane", "top", "left"), [("axial", "front", "right"), ("coronal", "head", "right"), ("sagittal", "head", "front")]
)
def test_planes_are_hung_as_radiologists_do(plane, top, left):
    ends = {"right": (slice(-1, None),), "front": (slice(None), slice(-1, None)), "head": (..., slice(-1, None))}
    for end, (row, column) in {top: (slice(0, 1), slice(None)), left: (slice(None), slice(0, 1))}.items():
        anatomy = np.zeros((5, 6, 7), np.int16)
        anatomy[ends[end]] = 1
        values, _ = radiological(*store(anatomy, TURNS[0]))
        picture = volumes.section(values, plane, 2)
        expected = np.zeros_like(picture)
        expected[row, column] = 1
        np.testing.assert_array_equal(picture, expected)


def test_oblique_volume_goes_to_the_nearest_axes():
    angle = np.radians(20)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    stored, affine = store(ANATOMY, TURNS[17])
    values, grid = radiological(stored, tilt @ affine)
    np.testing.assert_array_equal(values, ANATOMY[::-1, ::-1, ::-1].transpose(2, 1, 0))
    np.testing.assert_allclose(grid.spacing, SPACING[::-1])


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 0, 1, 1])])
def test_affine_that_places_nothing_is_an_error(affine):
    with pytest.raises(SourceError, match=r"a\.nii: its affine .* places no volume"):
        volumes.to_radiological(affine, (3, 3, 3), "a.nii")


def test_grids_of_other_shape_or_place_differ():
    grid = grid_of((4, 5, 6))
    grid.check_same(Grid((4, 5, 6), grid.affine + 1e-3), "a")
    with pytest.raises(SourceError, match=r"a: the labels have 4 x 5 x 7 voxels .* image 4 x 5 x 6"):
        grid.check_same(grid_of((4, 5, 7)), "a")
    moved = grid.affine.copy()
    moved[1, 3] = 2
    with pytest.raises(SourceError, match=r"up to 2 mm away"):
        grid.check_same(Grid((4, 5, 6), moved), "a")
    with pytest.raises(SourceError, match=r"up to 3 mm away"):  # the origin is right, the far corner is not
        grid.check_same(grid_of((4, 5, 6), (2.0, 1.0, 1.0)), "a")


def block(shape=(100, 60, 60), start=0, stop=100, value=1) -> np.ndarray:
    values = np.zeros(shape, np.uint16)
    values[start:stop, 20:40, 20:40] = value
    return values


def planned(labels: Labels, spacing=(1.0, 1.0, 1.0), **rule) -> list[int]:
    rule = {"planes": ("axial",), **rule}
    shape = labels.layers[0].shape
    return [index for _, index in volumes.plan_slices(labels, grid_of(shape, spacing), SliceRule(**rule))]


def test_slices_are_so_many_millimetres_apart():
    assert planned(labels_of(block(), liver=1), step_mm=20) == [10, 30, 50, 70, 90]
    assert planned(labels_of(block(), liver=1), (4.0, 1.0, 1.0), step_mm=80, max_stretch=9) == [10, 30, 50, 70, 90]


def test_a_structure_asks_for_a_limited_number_spread_over_it():
    assert planned(labels_of(block(), liver=1), step_mm=10, max_slices=2) == [25, 75]


def test_slices_without_structures_are_left_out():
    assert planned(labels_of(block(start=28, stop=53), liver=1), step_mm=10) == [35, 45]


def test_a_structure_between_the_slices_gets_its_largest():
    values = block(start=41, stop=45)
    values[43, 10:50, 10:50] = 1
    assert planned(labels_of(values, liver=1), step_mm=20) == [43]


def test_every_lesion_asks_for_slices():
    values = block(start=0, stop=35) | block(start=41, stop=44)
    assert planned(labels_of(values, liver=1), step_mm=20) == [10, 30]
    assert planned(labels_of(values, liver_tumor=1), step_mm=20) == [10, 30, 41]


def test_small_structures_ask_for_nothing():
    values = np.zeros((100, 60, 60), np.uint16)
    values[:, 5:8, 5:9] = 1  # 12 pixels
    assert planned(labels_of(values, liver=1), min_area_px=12)
    assert not planned(labels_of(values, liver=1), min_area_px=13)
    assert not planned(labels_of(values, liver=1), min_area_px=1, min_area_mm2=12.5)
    assert planned(labels_of(values, liver=1), (1.0, 2.0, 2.0), min_area_px=1, min_area_mm2=12.5)


def test_planes_of_long_pixels_or_narrow_pictures_are_left_out():
    def planes(shape, spacing):
        labels = labels_of(np.ones(shape, np.uint16), liver=1)
        return {plane for plane, _ in volumes.plan_slices(labels, grid_of(shape, spacing), SliceRule())}

    assert planes((60, 60, 60), (1.0, 1.0, 1.0)) == {"axial", "coronal", "sagittal"}
    assert planes((60, 60, 60), (4.0, 1.0, 1.0)) == {"axial"}
    assert planes((60, 60, 60), (1.0, 4.0, 1.0)) == {"coronal"}
    assert planes((40, 60, 60), (1.0, 1.0, 1.0)) == {"axial"}


def test_overlapping_structures_lie_in_different_layers():
    labels = Labels((2, 4, 4))
    one, two, three = np.zeros((3, 2, 4, 4), bool)
    one[:, :2], two[:, 1:3], three[:, 3] = True, True, True
    for name, mask in (("one", one), ("two", two), ("three", three), ("none", np.zeros_like(one))):
        labels.add(name, mask)
    assert len(labels.layers) == 2
    found = {labels.names[value]: layer == value for layer in labels.layers for value in np.unique(layer) if value}
    assert set(labels.names.values()) == set(found) == {"one", "two", "three"}
    np.testing.assert_array_equal(found["one"], one)
    np.testing.assert_array_equal(found["two"], two)


@pytest.mark.parametrize(("one_by_one", "count"), [(True, 2), (False, 1)])
def test_components_touch_at_corners_and_tiny_ones_are_dropped(one_by_one, count):
    mask = np.zeros((12, 12), bool)
    mask[0:2, 0:2] = mask[2:4, 2:4] = mask[8:11, 8:11] = mask[0, 11] = True
    parts, dropped = volumes.split_components(mask, 4, one_by_one)
    assert (len(parts), dropped) == (count, 1)
    mask[0, 11] = False
    np.testing.assert_array_equal(np.any(parts, axis=0), mask)


def test_nothing_is_left_of_specks():
    assert volumes.split_components(np.eye(3, dtype=bool), 4, False) == ([], 1)


def test_pixels_become_square_by_refining_the_coarser_axis():
    size, millimetres = volumes.square_size((10, 20), (4.0, 2.0))
    assert (size, millimetres) == ((20, 20), 2.0)
    assert volumes.square_size((10, 20), (2.0, 2.001)) == ((10, 20), 2.0)
    ramp = np.repeat(np.arange(10.0)[:, None], 20, axis=1)
    fine = volumes.resize_pixels(ramp, size)
    assert fine.shape == size
    np.testing.assert_allclose(fine[1:-1, 0], (np.arange(20)[1:-1] + 0.5) / 2 - 0.5, atol=1e-5)
    labels = np.zeros((10, 20), np.uint16)
    labels[3:5, 7:9] = 300
    expected = np.zeros(size, np.uint16)
    expected[6:10, 7:9] = 300
    np.testing.assert_array_equal(volumes.resize_labels(labels, size), expected)


def test_resizing_keeps_mirror_images_mirrored():
    pixels = np.random.default_rng(1).integers(0, 9, (7, 11)).astype(np.float32)
    for resize in (volumes.resize_pixels, volumes.resize_labels):
        there, back = resize(pixels, (17, 11)), resize(pixels[::-1], (17, 11))[::-1]
        np.testing.assert_allclose(there, back, atol=1e-5)


@pytest.mark.parametrize(
    ("areas", "window"),
    [
        ({"left_lung": 90, "heart": 40}, "lung"),
        ({"left_lung": 90, "heart": 140}, "soft_tissue"),
        ({"lung_lower_lobe_left": 90, "aorta": 20}, "lung"),
        ({"liver": 900, "lung_nodule": 5}, "lung"),
        ({"left_lung": 900, "liver_tumor": 5}, "soft_tissue"),
        ({"brain": 90, "skull": 30}, "brain"),
        ({"vertebrae_L3": 9, "rib_left_4": 9}, "bone"),
        ({"left_femur": 9}, "bone"),
        ({"maxilla": 9}, "bone"),  # by what it is one of, as the next
        ({"liver": 900, "subdural_hemorrhage": 5}, "brain"),
        ({"spinal_cord": 9}, "soft_tissue"),
        ({"left_lung": 900, "pulmonary_embolism": 5}, "soft_tissue"),
        ({}, "soft_tissue"),
    ],
)
def test_ct_window_is_that_of_the_lesions_else_of_the_largest_part(areas, window):
    assert volumes.choose_window(areas.items()) == window


def test_site_tells_which_window_a_tumor_needs():
    assert volumes.choose_window([("cancer", 5)], "lung") == "lung"


def test_window_maps_level_to_grey_and_ends_to_black_and_white():
    low, high = volumes.window_limits("lung")
    assert (low, high) == (-1350, 150)
    pixels = volumes.apply_window(np.asarray([[-3000, -1350, -600, 150, 3000, np.nan]]), low, high)
    np.testing.assert_array_equal(pixels, [[0, 0, 128, 255, 255, 0]])
    assert pixels.dtype == np.uint8


def test_constant_volume_is_black():
    assert not volumes.apply_window(
        np.full((2, 2), 7), *volumes.percentile_range(np.full((4, 4, 4), 7), (0.5, 99.5))
    ).any()


def test_percentiles_leave_out_outliers_and_what_is_not_finite():
    values = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    values[0, 0, 0], values[0, 0, 1], values[9, 9, 9] = np.nan, np.inf, 1e9
    low, high = volumes.percentile_range(values, (1, 99))
    assert low == pytest.approx(12, abs=1) and high == pytest.approx(989, abs=1)


def test_percentiles_of_a_sample_are_near(monkeypatch):
    values = np.random.default_rng(0).normal(size=(40, 50, 60))
    exact = volumes.percentile_range(values, (10, 90))
    monkeypatch.setattr(volumes, "_PERCENTILE_VOXELS", 10_000)
    np.testing.assert_allclose(volumes.percentile_range(values, (10, 90)), exact, atol=0.05)


def test_png_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(volumes.encode_png(pixels)))), pixels)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"planes": ()}, "not none"),
        ({"planes": ("axial", "transversal")}, "not axial, transversal"),
        ({"window": "liver"}, "unknown window 'liver'"),
        ({"step_mm": 0}, "above 0"),
        ({"percentiles": (99, 1)}, "must rise"),
    ],
)
def test_bad_rules_are_errors(rule, message):
    with pytest.raises(ValueError, match=message):
        SliceRule(**rule)


def test_missing_package_is_an_error_that_says_what_to_install():
    with pytest.raises(SourceError, match=r"pip install 'medglip_jax\[medical\]'"):
        volumes.import_medical("no_such_package.orientations")
