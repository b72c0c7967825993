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


def test_table_lists_phrases_by_count_and_percentages():
    console = Console(record=True, width=100, file=io.StringIO())
    print_results(RESULTS, console)
    text = console.export_text()
    assert text.index("left lung") < text.index("nodule")
    assert "75.0" in text and "not shown by any image: 1 more" in text
    assert "AP 50.0  AP50 75.0  AP75 -  on 4 images, 2.0 images/s" in text
    assert "xray" in text
