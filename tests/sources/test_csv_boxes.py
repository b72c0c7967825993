import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.sources import detect_source, load_source
from tests.sources.radiographs import PATIENT, write_radiograph

RSNA = "patientId,x,y,width,height,Target"
VINDR = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
NIH = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def write_csv(folder, *lines, images=("a",), name="boxes.csv"):
    for stem in images:
        (folder / "images" / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(folder / "images" / f"{stem}.png")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines), encoding="utf-8-sig")
    return folder


def read(folder):
    return load_source("auto", folder, dataset="chests", modality="xray")


def boxes(example):
    return [(region.label, region.box.tolist()) for region in example.regions]


def test_rsna(tmp_path):
    write_csv(tmp_path, RSNA, "a,1.0,2.0,10,20,1", "b,,,,,0", "a,5,6,7,8,1", images=("a", "b"))
    ill, normal = read(tmp_path)
    assert boxes(ill) == [("lung_opacity", [1, 2, 11, 22]), ("lung_opacity", [5, 6, 12, 14])]
    assert (ill.absent, ill.patient_id, ill.modality) == ((), hash_patient("a", "chests"), "xray")
    assert (normal.image_id, normal.regions, normal.absent) == ("b", (), ("lung_opacity",))


def test_vindr_keeps_every_readers_box_and_no_finding_is_a_normal_image(tmp_path):
    lines = [
        "a,Pleural effusion,10,R8,1,2,11,22",
        "b,No finding,14,R8,,,,",
        "a,Pleural effusion,10,R9,1,2,12,22",
        "a,Odd sign,3,R9,4,4,8,8",
        "b,No finding,14,R9,0,0,1,1",
    ]
    ill, normal = read(write_csv(tmp_path, VINDR, *lines, images=("a", "b"), name="annotations/train.csv"))
    effusion = "pleural_effusion"
    assert boxes(ill) == [(effusion, [1, 2, 11, 22]), (effusion, [1, 2, 12, 22]), ("Odd sign", [4, 4, 8, 8])]
    assert (normal.regions, normal.absent) == ((), (effusion, "Odd sign"))


def test_nih_header_with_commas_and_patients_in_the_names(tmp_path):
    line = "00013118_008.png,Infiltrate,2.5,5,10,20,,,"
    (example,) = read(write_csv(tmp_path, NIH, line, images=["00013118_008"]))
    assert boxes(example) == [("lung_infiltrate", [2.5, 5, 12.5, 25])]
    assert (example.image_id, example.patient_id) == ("00013118_008", hash_patient("00013118", "chests"))


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("image,label,x0,y0,x1,y1", "images/a.png,RBC,1,2,11,22"),
        ("image,label,x1,y1,x2,y2", "./images\\a.png,RBC,1,2,11,22"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.jpg,50,40,RBC,1,2,11,22"),
        ("Label,X,Y,W,H,Patient ID,Image", "RBC,1,2,10,20,Doe,a"),
    ],
)
def test_other_headers(tmp_path, header, line):
    (example,) = read(write_csv(tmp_path, header, line))
    assert boxes(example) == [("red_blood_cell", [1, 2, 11, 22])]
    assert (example.patient_id == hash_patient("Doe", "chests")) == ("Doe" in line)


def test_image_without_a_row_is_unused(tmp_path):
    source = read(write_csv(tmp_path, VINDR, "a,No finding,14,R8,,,,", images=("a", "b")))
    assert (len(source), source.unused) == (1, [str(tmp_path / "images/b.png")])


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        (VINDR, "a,Mass,1,R8,1,2,x,4", "'x' in column 7 is no number"),
        (VINDR, "a,Mass,1,R8,1,,3,4", "'' in column 6 is no number"),
        (VINDR, "a,Mass,1,R8,1,2,inf,4", "'inf' in column 7"),
        (VINDR, "a,Mass,1,R8,,,,", "'Mass' has no box"),
        (VINDR, "a,,1,R8,1,2,3,4", "has no words"),
        (VINDR, "a,Mass,1", "has only 3 columns"),
        (VINDR, ",Mass,1,R8,1,2,3,4", "names no image"),
        (VINDR, "z,Mass,1,R8,1,2,3,4", r"there is no image z"),
        (RSNA, "a,,,,,1", "Target must be 1 with a box or 0 without"),
        (RSNA, "a,1,2,3,4,0", "Target must be"),
        (RSNA, "a,1,2,3,4,2", "Target must be"),
    ],
)
def test_bad_row_is_an_error_that_names_file_and_line(tmp_path, header, line, message):
    write_csv(tmp_path, header, line)
    with pytest.raises(SourceError, match=f"boxes.csv, line 2: .*{message}"):
        read(tmp_path)[0]


def test_image_of_another_size_is_an_error(tmp_path):
    write_csv(tmp_path, "filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,100,80,RBC,1,2,11,22")
    with pytest.raises(SourceError, match=r"a.png: the image is 50 x 40 pixels, its annotation says 100 x 80"):
        read(tmp_path)[0]


def test_two_images_of_one_name_are_an_error(tmp_path):
    write_csv(tmp_path, VINDR, "a,No finding,14,R8,,,,", images=("x/a", "y/a"))
    with pytest.raises(SourceError, match="several images a: "):
        read(tmp_path)[0]


def test_file_without_rows_and_folder_without_file_are_errors(tmp_path):
    with pytest.raises(SourceError, match="has no rows"):
        read(write_csv(tmp_path, VINDR))
    write_csv(tmp_path, "image,score", "a,1")
    (tmp_path / "notes.csv").write_text("x" * 10**6)
    with pytest.raises(SourceError, match="expected one CSV file with columns"):
        load_source("csv", tmp_path, dataset="chests")


def test_several_files_are_an_error_and_one_can_be_chosen(tmp_path):
    write_csv(tmp_path, VINDR, "a,No finding,14,R8,,,,")
    write_csv(tmp_path, VINDR, "a,Mass,1,R8,1,2,3,4", name="annotations/other.csv")
    with pytest.raises(SourceError, match=r"boxes\.csv, .*other\.csv"):
        read(tmp_path)
    assert len(read(tmp_path / "annotations/other.csv")[0].regions) == 1


@pytest.mark.parametrize("suffix", [".dcm", ".dicom"])
def test_radiographs_may_be_dicom_files(tmp_path, suffix):
    pytest.importorskip("pydicom")
    write_csv(tmp_path, VINDR, "a,Mass,1,R8,1,2,3,4", "b,Mass,1,R8,1,2,3,4", images=("b",))
    write_radiograph(tmp_path / f"train/a{suffix}", PixelSpacing=[0.2, 0.3])
    assert detect_source(tmp_path) == "csv"
    source = load_source("auto", tmp_path, dataset="chests")
    first, second = source
    assert boxes(first) == boxes(second) != []
    assert (first.height, first.width, first.spacing_mm, first.modality) == (30, 40, (0.2, 0.3), "xray")
    assert first.patient_id == hash_patient(PATIENT, "chests")
    assert (second.height, second.spacing_mm, second.patient_id) == (40, (0, 0), "")
    assert source.unused == []


def test_patient_column_goes_before_the_dicom_header(tmp_path):
    pytest.importorskip("pydicom")
    write_radiograph(write_csv(tmp_path, RSNA, "a,1,2,3,4,1", images=()) / "stage_2_train_images/a.dcm")
    assert read(tmp_path)[0].patient_id == hash_patient("a", "chests")


def test_link_to_a_dicom_file_outside_the_folder_is_an_error(tmp_path):
    pytest.importorskip("pydicom")
    outside = write_radiograph(tmp_path / "elsewhere/a.dcm")
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/images/a.dcm").symlink_to(outside)
    with pytest.raises(SourceError, match="a symbolic link leads out of"):
        read(write_csv(tmp_path / "data", VINDR, "a,Mass,1,R8,1,2,3,4", images=()))[0]


def test_dicom_file_beside_an_image_of_its_name_is_an_error(tmp_path):
    write_csv(tmp_path, VINDR, "a,Mass,1,R8,1,2,3,4")
    (tmp_path / "images/a.dcm").touch()
    with pytest.raises(SourceError, match=r"a.png and .*a.dcm have the same name"):
        read(tmp_path)


def test_boxes_on_real_dicom_slices(tmp_path, shared_dir):
    pytest.importorskip("pydicom")
    for index, path in enumerate(sorted((shared_dir / "data/totalsegmentator/ct_dicom/series").iterdir())[:2]):
        shutil.copy(path, tmp_path / f"s{index}.dcm")
    write_csv(tmp_path, "image,label,x0,y0,x1,y1", "s0,liver,10,20,300,200", "s1.dcm,liver,1,2,30,40", images=())
    first, second = load_source("csv", tmp_path, dataset="slices")
    assert (first.modality, first.height, boxes(first)) == ("ct", 512, [("liver", [10, 20, 300, 200])])
    assert first.patient_id == second.patient_id
