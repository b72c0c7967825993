import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, hash_identifier, hash_patient
from data_pipelines.sources import detect_source, load_source
from data_pipelines.sources.run_lengths import encode_runs
from tests.sources.radiographs import PATIENT, write_radiograph

SIZE = (12, 20)
FIRST, SECOND = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
FIRST[2:5, 3:9] = SECOND[6:11, 10:12] = True
SIIM = "ImageId, EncodedPixels"


def write_rle(folder, *lines, images=("a", "b"), name="train-rle.csv"):
    for stem in images:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / f"images/{stem}.png")
    (folder / name).write_text("\n".join(lines))
    return folder


def read(folder, source="rle_csv", **options):
    options = {"runs": "relative", "label": "Pneumothorax", **options}
    return load_source(source, folder, dataset="d", modality="xray", options=options)


def row(image, mask, runs="relative", **options):
    return f"{image}, {encode_runs(mask, runs, **options)}"


def boxes(example):
    return [(region.label, region.box.tolist()) for region in example.regions]


def test_rows_are_regions_and_minus_one_is_an_image_without_the_class(tmp_path):
    ill, normal = read(write_rle(tmp_path, SIIM, row("a", FIRST), "b, -1", row("a", SECOND)))
    assert boxes(ill) == [("pneumothorax", [3, 2, 9, 5]), ("pneumothorax", [10, 6, 12, 11])]
    np.testing.assert_array_equal(coco_mask.decode(ill.regions[0].mask), FIRST)
    assert (ill.image_id, ill.absent, ill.modality) == ("a", (), "xray")
    assert (normal.image_id, normal.regions, normal.absent) == ("b", (), ("pneumothorax",))


@pytest.mark.parametrize("order", ["columns", "rows"])
def test_absolute_runs_in_either_order(tmp_path, order):
    write_rle(tmp_path, SIIM, row("a", FIRST, "absolute", order=order), images=("a",))
    (example,) = read(tmp_path, runs="absolute", order=order)
    assert boxes(example) == [("pneumothorax", [3, 2, 9, 5])]


def test_images_are_dicom_files_anywhere_in_the_folder(tmp_path):
    pixels = np.linspace(0, 4095, FIRST.size).astype(np.uint16).reshape(SIZE)
    write_radiograph(tmp_path / "dicom-images-train/1.2/1.3/1.2.276.0.dcm", pixels)
    write_radiograph(tmp_path / "dicom-images-test/1.2/1.4/1.2.276.1.dcm", pixels)
    write_rle(tmp_path, SIIM, row("1.2.276.0", FIRST), images=())
    source = read(tmp_path, source="auto")
    assert boxes(source[0]) == [("pneumothorax", [3, 2, 9, 5])]
    assert source[0].patient_id == hash_identifier("patient", PATIENT, "d")
    assert source.unused == [str(tmp_path / "dicom-images-test/1.2/1.4/1.2.276.1.dcm")]


def test_class_and_patient_may_be_columns(tmp_path):
    lines = [f"a.png,liver,{encode_runs(FIRST, 'absolute')},p", "a.png,spleen,,p", "b.png,liver,,q", "b.png,spleen,,q"]
    write_rle(tmp_path, "filename,class,rle,patient_id", *lines)
    first, second = read(tmp_path, runs="absolute", label="")
    assert boxes(first) == [("liver", [3, 2, 9, 5])]
    assert (second.regions, second.absent) == ((), ("liver", "spleen"))
    assert [first.patient_id, second.patient_id] == [hash_patient("p", "d"), hash_patient("q", "d")]


def test_row_is_one_region_unless_components_are_asked_for(tmp_path):
    write_rle(tmp_path, SIIM, row("a", FIRST | SECOND), images=("a",))
    assert boxes(read(tmp_path)[0]) == [("pneumothorax", [3, 2, 12, 11])]
    assert len(read(tmp_path, regions="component")[0].regions) == 2


def test_option_names_one_of_several_tables(tmp_path):
    write_rle(tmp_path, SIIM, row("a", FIRST))
    write_rle(tmp_path, SIIM, "b, -1", name="sample_submission.csv")
    with pytest.raises(SourceError, match=r"found several: .*sample_submission\.csv.*name one as the option table"):
        read(tmp_path)
    assert [example.image_id for example in read(tmp_path, table="train-rle.csv")] == ["a"]
    with pytest.raises(SourceError, match="leaves the input folder"):
        read(tmp_path, table="../train-rle.csv")
    with pytest.raises(SourceError, match=r"other\.csv: expected one CSV file .*found none"):
        read(tmp_path, table="other.csv")


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        (
            row("a", FIRST),
            {"runs": ""},
            r"train-rle\.csv: the option runs must say .* relative \(SIIM-ACR\) or absolute",
        ),
        (row("a", FIRST), {"label": ""}, "has no column of classes, so that the option label must name"),
        (", 1 2", {}, "line 2: names no image"),
        ("c, 1 2", {}, r"line 2: there is no image c\.\*"),
        ("a, 1 2 3", {}, "line 2: has 3 numbers"),
        (row("a", FIRST), {"runs": "absolute"}, r"line 2: has runs that begin before .* are they relative\?"),
        (row("a", ~FIRST, "absolute"), {}, r"line 2: has runs beyond the end of the image, 20 x 12 pixels"),
    ],
)
def test_mistakes_are_errors_that_name_the_line(tmp_path, line, options, message):
    with pytest.raises(SourceError, match=message):
        read(write_rle(tmp_path, SIIM, line, images=("a",)), **options)[0]


def test_table_of_the_bowl_beside_its_folders_leaves_them_their_layout(tmp_path):
    for place in ("images", "masks"):
        (tmp_path / "stage1_train" / ("0" * 64) / place).mkdir(parents=True)
        Image.fromarray(FIRST).save(tmp_path / "stage1_train" / ("0" * 64) / place / f"{'0' * 64}.png")
    write_rle(tmp_path, "ImageId,EncodedPixels", f"{'0' * 64},1 2", images=(), name="stage1_train_labels.csv")
    assert detect_source(tmp_path) == "instances"
