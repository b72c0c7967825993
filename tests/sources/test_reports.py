import csv
import json

import pytest
from PIL import Image

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.schema import Expression
from data_pipelines.sources import image_folder, load_source
from data_pipelines.sources.reports import split_sentences


def write_reports(folder, *rows, name="reports.csv", images=("a",)):
    (folder / "images").mkdir(exist_ok=True)
    for stem in images:
        Image.new("L", (40, 20)).save(folder / "images" / f"{stem}.png")
    with open(folder / name, "w", newline="") as file:
        if name.endswith(".jsonl"):
            file.write("\n".join(json.dumps(row) for row in rows))
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def row(sentence, image="a", **fields):
    return {"image": image, "sentence": sentence, **fields}


def read(folder, **options):
    return load_source("auto", folder, dataset="reports", modality="xray", options=options)


@pytest.mark.parametrize("name", ["reports.csv", "annotations.jsonl"])
def test_sentences_that_deny_or_call_normal_are_expressions_without_regions(tmp_path, name):
    report = "The lungs are clear. No pneumothorax. Tortuous aorta of 3.5 cm."
    (example,) = read(write_reports(tmp_path, row(report, **{"Patient ID": "7"}), name=name))
    assert example.expressions == (
        Expression("The lungs are clear.", kind="report"),
        Expression("No pneumothorax.", kind="negation"),
    )
    assert (example.caption, example.absent, example.regions) == (report, ("pneumothorax",), ())
    assert (example.patient_id, example.modality) == (hash_patient("7", "reports"), "xray")


def test_named_finding_without_a_box_is_neither_region_nor_expression_nor_absent(tmp_path):
    rows = [row("Small pneumothorax."), row("No pneumothorax."), row("No pleural effusion.")]
    (example,) = read(write_reports(tmp_path, *rows))
    assert [expression.text for expression in example.expressions] == ["No pneumothorax.", "No pleural effusion."]
    assert (example.absent, example.regions) == (("pleural_effusion",), ())
    assert example.caption == "Small pneumothorax. No pneumothorax. No pleural effusion."


def test_polarity_of_the_file_goes_before_the_rule(tmp_path):
    rows = [
        row("No widgets anywhere near the heart", polarity="Negative"),
        row("Heart and vessels in age-related state", polarity="normal"),
        row("No pneumothorax", polarity="uncertain"),
        row("No pleural effusion", polarity="positive"),
        row("No consolidation", polarity=""),
    ]
    (example,) = read(write_reports(tmp_path, *rows))
    assert [(e.text[:7], e.kind) for e in example.expressions] == [
        ("No widg", "negation"),
        ("Heart a", "report"),
        ("No cons", "negation"),
    ]
    assert example.absent == ("consolidation",)


def test_absent_labels_can_be_left_out(tmp_path):
    (example,) = read(write_reports(tmp_path, row("No pneumothorax.")), read_absent=False)
    assert example.absent == () and example.expressions


def test_sentences_end_before_capitals_and_at_line_ends():
    text = "Nodule of 3.5 cm, approx. round.  No effusion!\nheart normal\n\n"
    assert split_sentences(text) == ["Nodule of 3.5 cm, approx. round.", "No effusion!", "heart normal"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("")], "reports.csv, line 2: has no sentence"),
        ([row("x", image="")], "reports.csv, line 2: has no image"),
        ([row("x", polarity="maybe")], "line 2: polarity 'maybe' is none of positive"),
        ([row("x", image="z")], "line 2: there is no image z"),
        ([row("x", patient=1), row("x", patient=2)], "line 2: image a is of several patients"),
    ],
)
def test_bad_row_is_an_error_that_names_file_and_line(tmp_path, rows, message):
    with pytest.raises(SourceError, match=message):
        read(write_reports(tmp_path, *rows))[0]


def test_row_with_more_cells_than_the_header_is_an_error(tmp_path):
    write_reports(tmp_path, row("x"))
    (tmp_path / "reports.csv").write_text("image,sentence\na,No effusion, no fracture\n")
    with pytest.raises(SourceError, match="line 2: has 3 cells, the header 2; quote text with commas"):
        read(tmp_path)


def test_table_without_rows_and_several_tables_are_errors(tmp_path):
    write_reports(tmp_path, row("x"))
    (tmp_path / "reports.csv").write_text("image,sentence\n")
    with pytest.raises(SourceError, match="has no rows"):
        read(tmp_path)
    write_reports(tmp_path, row("x"), name="more.csv")
    with pytest.raises(SourceError, match=r"several: .*more.csv"):
        read(tmp_path)
    with pytest.raises(SourceError, match="and without boxes, found none"):
        load_source("reports", tmp_path / "images", dataset="reports")


def test_unused_images_are_named_or_counted(tmp_path, monkeypatch):
    write_reports(tmp_path, row("x"), images=("a", "b", "c"))
    assert read(tmp_path).unused == [str(tmp_path / f"images/{name}.png") for name in "bc"]
    monkeypatch.setattr(image_folder, "_LISTED", 1)
    assert read(tmp_path).unused == [f"{tmp_path}: 2 images without annotation"]
