"""The JSON file and the table of an evaluation."""

import io
import json

import pytest
from rich.console import Console

from medglip_jax.evaluation.report import print_results, write_json

RESULTS = {
    "AP": 0.5,
    "AP50": 0.75,
    "AP75": None,
    "per_class": {
        "nodule": {"AP": 0.25, "AP50": 0.5, "count": 2},
        "left lung": {"AP": 0.75, "AP50": 1.0, "count": 9},
        "mass": {"AP": None, "AP50": None, "count": 0},
    },
    "per_modality": {"ct": {"AP": 0.5, "AP50": 0.7, "images": 3}, "xray": {"AP": None, "AP50": None, "images": 1}},
    "images": 4,
    "seconds": 2.0,
    "images_per_second": 2.0,
}


def test_json_is_read_back_with_null_for_what_is_undefined(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(RESULTS, path)
    assert json.loads(path.read_text()) == RESULTS
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_keeps_the_older_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(RESULTS, path)
    with pytest.raises(ValueError):
        write_json({"AP": float("nan")}, path)
    assert json.loads(path.read_text()) == RESULTS
    assert len(list(tmp_path.iterdir())) == 1


def test_table_tells_levels_absent_phrases_and_agreement_where_they_were_measured():
    shares = {"accuracy": 0.875, "pointing": 1.0, "false_phrases": 0.125, "false_images": None}
    levels = {"organ": {"AP": 0.5, "AP50": None, "count": 9, **shares}}
    modalities = {name: entry | shares for name, entry in RESULTS["per_modality"].items()}
    consistency = {"score_violations": 0.25, "outside": None}
    added = {"per_level": levels, "per_modality": modalities, "score_threshold": 0.3, "consistency": consistency}
    broader = {"phrases": 3, "AP": 0.1, "AP50": 0.2, "accuracy": 0.3}
    console = Console(record=True, width=140, file=io.StringIO())
    print_results({**RESULTS, **shares, **added, "broader": broader}, console)
    text = console.export_text()
    assert "Acc@0.5 87.5, pointing 100.0" in text and "score 0.3 and more, in - of images" in text
    assert "25.0 score above a broader name" in text and "3 broader names: AP 10.0  AP50 20.0  Acc@0.5 30.0" in text
    row = next(line for line in text.splitlines() if "organ" in line and "50.0" in line)
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    assert cells == ["organ", "50.0", "-", "87.5", "100.0", "12.5", "9"]


def test_table_lists_phrases_by_count_and_percentages():
    console = Console(record=True, width=100, file=io.StringIO())
    print_results(RESULTS, console)
    text = console.export_text()
    assert text.index("left lung") < text.index("nodule")
    assert "75.0" in text and "not shown by any image: 1 more" in text
    assert "AP 50.0  AP50 75.0  AP75 -  on 4 images, 2.0 images/s" in text
    assert "xray" in text
