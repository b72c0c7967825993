"""The audit of records: every kind of finding from an example made for it, and a page that stands alone."""

import dataclasses
import json
import re

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import audit, commands
from data_pipelines.audit_drawing import draw_picture
from data_pipelines.audit_findings import KINDS, check_record
from data_pipelines.audit_pixels import (
    HASH_DISTANCE,
    digest_pixels,
    find_near,
    find_writing,
    hash_picture,
    look_alike,
    make_thumbnail,
    to_grey,
)
from data_pipelines.audit_privacy import find_private, mask_private
from data_pipelines.conflicts import Conflict, ConflictReport
from data_pipelines.records import RecordsWriter
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.phantoms import KINDS as KINDS_OF_PHANTOMS
from data_pipelines.sources.phantoms import Phantoms, phantom
from data_pipelines.transforms import decode_image


def _example(*regions, size=64, **fields):
    """A picture of noise, one for each size."""
    fields = {"image_id": "a", "dataset": "made", "modality": "ct", **fields}
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    return GroundingExample(image=_encode(noise), height=size, width=size, regions=regions, **fields)


def _region(label, box=(8, 8, 40, 40), phrase=None, **fields):
    return Region(np.asarray(box, np.float32), phrase or label.replace("_", " "), label, **fields)


def _encode(pixels, suffix=".png", *options):
    return cv2.imencode(suffix, pixels[..., ::-1], list(options))[1].tobytes()


def _write_on(pixels, *lines, height=16):
    pixels = pixels.copy()
    for row, line in enumerate(lines):
        cv2.putText(pixels, line, (4, height * (row + 1)), cv2.FONT_HERSHEY_SIMPLEX, height / 40, (255, 255, 255), 1)
    return pixels


def _kinds(example):
    return [kind for kind, _ in check_record(example)]


def _write(directory, examples, file_format="array_record"):
    with RecordsWriter(directory, name="made", file_format=file_format) as writer:
        for example, split in examples:
            writer.write(example, split)
        writer.commit()
    return directory


def _audit(directory, **options):
    return audit.audit(directory, progress=False, **options)


def _entry(report, kind):
    return next((entry for entry in report["findings"] if entry["kind"] == kind), None)


def test_one_box_with_two_labels_is_a_conflict():
    assert _kinds(_example(_region("liver"), _region("spleen"))) == ["two_labels"]
    assert _kinds(_example(_region("liver", (0, 0, 60, 60)), _region("spleen", (0, 0, 60, 62)))) == []


@pytest.mark.parametrize(
    "inner", [_region("left_lung"), _region("left_upper_lung_zone"), _region("my_nodule", parent="lung")]
)
def test_a_structure_and_what_holds_it_may_share_a_box(inner):
    assert _kinds(_example(_region("lung"), inner)) == []


def test_a_box_annotated_twice_is_found_under_any_of_its_names():
    twice = _example(_region("liver"), _region("Liver", (8, 8, 40, 40.5)))
    assert _kinds(twice) == ["doubled_box"]
    assert _kinds(_example(_region("liver"), _region("liver", iscrowd=True))) == []


def test_a_shown_label_cannot_be_absent():
    assert _kinds(_example(_region("lung_nodule"), absent=("nodule",))) == ["shown_and_absent"]
    assert _kinds(_example(_region("lung_nodule"), absent=("lung_tumor",))) == []


@pytest.mark.parametrize(
    ("phrase", "label", "wrong"),
    [
        ("left lung", "right_lung", True),
        ("left lung", "lung", True),
        ("shadow of the left side", "shadow_right", True),
        ("left lung", "left_lung", False),
        ("kidney left", "left_kidney", False),
        ("nodule in the left lung", "lung_nodule", False),
        ("left and right lung", "lung", False),
        ("bright spot", "left_lung", False),
    ],
)
def test_sides_of_phrase_and_label_must_agree(phrase, label, wrong):
    assert ("side_differs" in _kinds(_example(_region(label, phrase=phrase)))) == wrong


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 65, 5), (5, 5, 5, 9), (0, np.nan, 5, 5)])
def test_a_box_must_lie_in_its_image(box):
    assert "box_outside" in _kinds(_example(_region("liver", box)))


def test_a_box_that_is_no_number_spoils_neither_file(tmp_path):
    directory = _write(tmp_path / "r", [(_example(_region("liver", [np.nan] * 4), _region("lung")), "train")])
    audit.write_audit(_audit(directory), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert _entry(report, "box_outside")["examples"][0]["boxes"] == [[None] * 4]


PRIVATE = [
    ("seen on 2021-03-12", "date"),
    ("12/03/2021", "date"),
    ("3.12.21", "date"),
    ("scan_20210312", "date"),
    ("12 March 2021", "date"),
    ("MRN1234567", "long number"),
    ("DOE^JANE^^", "dicom name"),
    ("VAN DER BERG^JAN", "dicom name"),
    ("/home/jane/scan.dcm", "file path"),
    (r"C:\scans\jane.dcm", "file path"),
    ("jane.doe@hospital.org", "e-mail"),
    ("1.2.840.113619.2.55.3", "dicom uid"),
]


@pytest.mark.parametrize(("text", "kind"), PRIVATE)
def test_private_text_is_found_and_masked(text, kind):
    found = find_private(text)
    assert [type_ for type_, *_ in found] == [kind]
    secret = text[found[0][2] : found[0][3]]
    assert not set(re.findall(r"[^\W_]", found[0][1])) - {"x"}
    assert secret not in mask_private(text)


@pytest.mark.parametrize(
    "text",
    [
        "phantoms-ct-256-0-12",
        "BloodImage_00012",
        "a 12.5 x 3 mm nodule, 1/2 resolved",
        "3f786850e387550f",
        "left/right",
        "folder/image_12",
        "x^2",
    ],
)
def test_ordinary_text_is_not_private(text):
    assert find_private(text) == ()


@st.composite
def _phantoms(draw):
    return draw(st.integers(0, 400)), draw(st.integers(0, 3))


@hypothesis.given(_phantoms(), st.floats(0.75, 1.3), st.integers(50, 95))
def test_the_hash_survives_reencoding_and_resizing(which, scale, quality):
    pixels = decode_image(phantom(which[0], seed=which[1], size=128).image)
    copy = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    copy = decode_image(_encode(copy, ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality))
    distance = (hash_picture(to_grey(pixels)) ^ hash_picture(to_grey(copy))).bit_count()
    assert distance <= HASH_DISTANCE
    assert look_alike(make_thumbnail(pixels), make_thumbnail(copy))


@hypothesis.given(st.sampled_from(sorted(KINDS_OF_PHANTOMS)), st.integers(0, 999), st.integers(0, 999))
def test_different_phantoms_do_not_look_alike(modality, one, other):
    hypothesis.assume(one != other)
    a, b = (decode_image(phantom(index, modality=modality, size=128).image) for index in (one, other))
    assert not look_alike(make_thumbnail(a), make_thumbnail(b))
    assert digest_pixels(a) != digest_pixels(b)


def test_a_digest_is_of_the_pixels_not_of_the_file():
    pixels = decode_image(phantom(0, size=64).image)
    assert digest_pixels(decode_image(_encode(pixels))) == digest_pixels(pixels)
    assert digest_pixels(pixels.reshape(128, 32, 3)) != digest_pixels(pixels)


@hypothesis.given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=7)), max_size=12),
)
def test_near_hashes_are_those_of_a_full_comparison(seeds, changes):
    hashes = np.asarray(
        [*seeds, *(seeds[k % len(seeds)] ^ sum(1 << bit for bit in bits) for k, bits in changes)], np.uint64
    )
    rows, columns = np.triu_indices(len(hashes), 1)
    near = np.bitwise_count(hashes[rows] ^ hashes[columns]) <= HASH_DISTANCE
    pairs, complete = find_near(hashes)
    assert complete
    assert pairs.tolist() == np.stack([rows, columns], axis=1)[near].tolist()


def make_far_pairs(count: int) -> np.ndarray:
    """Pairs of hashes, one after the other, that differ by as much as near ones may, in bits far from one another."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**64, count, np.uint64)
    changes = [sum(1 << int(bit) for bit in rng.permutation(8)[:HASH_DISTANCE] * 8) for _ in range(count)]
    return np.stack([first, first ^ np.asarray(changes, np.uint64)], axis=1).ravel()


def test_hashes_that_differ_all_over_are_found():
    pairs, complete = find_near(make_far_pairs(300))
    assert complete
    assert pairs.tolist() == [[2 * k, 2 * k + 1] for k in range(300)]


def test_a_search_with_too_many_pairs_ends_and_says_so():
    pairs, complete = find_near(np.zeros(2000, np.uint64), most=50)
    assert not complete and len(pairs) < 2050
    assert not find_near(make_far_pairs(300), most=250)[1]


@pytest.mark.parametrize("modality", ["ct", "xray", "endoscopy"])
def test_writing_is_found_and_its_place_is_named(modality):
    pixels = decode_image(phantom(3, modality=modality, size=512).image)
    assert find_writing(to_grey(pixels)) == []
    lines = find_writing(to_grey(_write_on(pixels, "12/03/2021 14:07", "ID 4471920", height=24)))
    assert lines
    assert all(line.box[3] < 80 for line in lines)


def test_the_ticks_of_a_ruler_are_no_writing():
    assert find_writing(to_grey(decode_image(phantom(15, modality="dermoscopy", size=128).image))) == []


def test_the_burnt_in_date_of_a_real_image_is_found(shared_dir):
    paths = sorted((shared_dir / "data" / "biomedparse_demo" / "images").glob("*.png"))
    found = [path.stem for path in paths if find_writing(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))]
    assert "24_endoscope_colon" in found
    assert len(found) <= 3 < len(paths)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Twelve phantoms in two splits, copies of some of them, and records with mistakes."""
    plain = list(Phantoms(12, size=128))
    small = cv2.resize(decode_image(plain[4].image), None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
    copies = [
        dataclasses.replace(plain[1], image_id="copy"),
        dataclasses.replace(
            plain[4], image_id="small", regions=(), height=len(small), width=len(small), image=_encode(small, ".jpg")
        ),
        dataclasses.replace(plain[5], image=plain[7].image),
    ]
    mistakes = [
        _example(
            _region("hart"),
            _region("BOE^JANE", (0, 0, 9, 9)),
            patient_id="7",
            caption="of DOE^JANE",
            image_id="1.2.840.113619.2.55.4711",
        ),
        dataclasses.replace(_example(_region("liver"), image_id="broken"), image=b"nothing"),
        dataclasses.replace(_example(_region("liver"), image_id="larger"), height=80),
        dataclasses.replace(_example(image_id="other", patient_id="7", size=65)),
    ]
    examples = [(example, "validation" if k % 4 == 0 else "train") for k, example in enumerate(plain)]
    examples += [(copies[0], "train"), (copies[1], "train"), (copies[2], "validation")]
    examples += [(mistake, "train") for mistake in mistakes[:3]] + [(mistakes[3], "validation")]
    directory = _write(tmp_path_factory.mktemp("messy") / "records", examples)
    return directory, _audit(directory, samples=2)


def test_copies_and_leaks_are_found(messy):
    report = messy[1].report
    near = _entry(report, "leak_near_duplicate")["examples"]
    assert [sorted(record["split"] for record in entry["records"]) for entry in near] == [["train", "validation"]]
    assert sorted(record["index"] for record in near[0]["records"]) == [1, 10]
    assert _entry(report, "duplicate")["count"] == 1
    assert _entry(report, "leak_duplicate")["count"] == 1
    assert _entry(report, "leak_image_id")["count"] == 1
    assert _entry(report, "leak_patient")["examples"][0]["datasets"] == ["made"]
    assert _entry(report, "near_duplicate") is None


def test_records_that_cannot_be_used_are_named(messy):
    problems = {
        entry["records"][0]["index"]: entry["problem"] for entry in _entry(messy[1].report, "unreadable")["examples"]
    }
    assert set(problems) == {12, 13}
    assert "64 x 64 pixels, its record says 64 x 80" in problems[13]


def test_an_unknown_label_comes_with_the_nearest(messy):
    entry = _entry(messy[1].report, "unknown_label")["examples"][0]
    assert (entry["label"], entry["regions"], entry["nearest"][0]) == ("hart", 1, "heart")
    assert _entry(messy[1].report, "unknown_phrase")["count"] == 2


def test_counts_are_those_of_the_records(messy):
    report = messy[1].report
    assert report["counts"]["images"] == 19
    assert report["counts"]["images_without_boxes"] == 2
    assert report["splits"]["validation"]["images"] == 5
    assert report["counts"]["regions"] == sum(sum(e["regions"].values()) for e in report["labels"].values())
    assert sum(report["histograms"]["boxes_per_image"]["counts"]) == 19
    assert report["modalities"]["ct"]["images"] == 7
    assert sum(report["summary"].values()) == sum(entry["count"] for entry in report["findings"])
    assert set(report["summary"]) == {"error", "warning", "info"}


def test_what_may_be_private_is_nowhere_in_the_output(messy, tmp_path):
    page = audit.write_audit(messy[1], tmp_path)
    text = page.read_text() + (tmp_path / "audit.json").read_text()
    assert {entry["type"] for entry in _entry(messy[1].report, "private_text")["examples"]} == {
        "dicom name",
        "dicom uid",
    }
    assert _entry(messy[1].report, "plain_patient_id")["count"] == 2
    assert "JANE" not in text
    assert "4711" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_page_stands_alone(messy, tmp_path):
    page = audit.write_audit(messy[1], tmp_path).read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/|#)", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<img") > 8
    assert all(KINDS[entry["kind"]].title in page for entry in messy[1].report["findings"])
    assert json.loads((tmp_path / "audit.json").read_text()) == messy[1].report


def test_a_box_that_is_no_number_is_not_drawn():
    pixels = np.full((40, 40, 3), 128, np.uint8)
    assert draw_picture(pixels, "", [[np.nan] * 4] * 2, ["a", "b"]).uri == draw_picture(pixels, "", [], []).uri
    assert draw_picture(pixels, "", [[2, 2, 30, 30]] * 2, ["a", "b"]).uri != draw_picture(pixels, "", [], []).uri


def test_names_in_records_cannot_break_the_page(tmp_path):
    directory = _write(tmp_path / "r", [(_example(_region("<b>lung</b>"), caption="<i>&"), "train")])
    page = audit.write_audit(_audit(directory), tmp_path / "out").read_text()
    assert "&lt;b&gt;lung" in page
    assert "<b>lung" not in page
    assert "<i>&" not in page


def test_the_report_is_the_same_at_every_audit_and_in_both_formats(tmp_path):
    examples = [(example, "train") for example in Phantoms(24, size=64)]
    results = []
    for file_format in ("array_record", "tfrecord"):
        result = _audit(_write(tmp_path / file_format / "r", examples, file_format), samples=1, workers=2)
        assert result.report.pop("format") == file_format
        results.append(result)
    assert results[0] == results[1]
    assert {modality: len(sheet) for modality, sheet in results[0].samples.items()} == dict.fromkeys(
        sorted({example.modality for example, _ in examples}), 1
    )


def test_strict_fails_only_at_errors(tmp_path, messy, capsys):
    clean = _write(tmp_path / "clean", [(example, "train") for example in Phantoms(2, size=64)])
    assert commands.main(["audit", str(clean), "--strict"]) == 0
    assert (clean / "audit" / "audit.html").is_file()
    arguments = ["audit", str(messy[0]), "--output", str(tmp_path / "out"), "--samples", "0"]
    assert commands.main(arguments) == 0
    assert commands.main([*arguments, "--strict"]) == 1
    assert "Same pixels in several splits" in capsys.readouterr().out


@pytest.fixture
def held_out(tmp_path):
    """A split for training and one for zero-shot evaluation, with the conflicts that the build found."""
    shown = [("liver", "train"), ("liver", "train"), ("spleen", "zero_shot"), ("polyp", "validation")]
    examples = [
        (_example(_region(label), size=64 + k, image_id=str(k)), split) for k, (label, split) in enumerate(shown)
    ]
    directory = _write(tmp_path / "records", examples)
    report = ConflictReport(listed=1)
    for number in range(3):
        report.add(Conflict("two_labels", "keep_both", "made", f"scan of DOE^JANE {number}", ("<b>", "spleen"), "x"))
    (directory / "conflicts.json").write_text(json.dumps(report.as_dict()))
    return directory


def test_conflicts_of_the_build_are_shown(held_out, tmp_path):
    result = _audit(held_out)
    conflicts = result.report["conflicts"]
    assert conflicts["counts"] == {"two_labels": {"keep_both": 3}}
    assert conflicts["datasets"] == {"made": {"two_labels": {"keep_both": 3}}}
    page = audit.write_audit(result, tmp_path / "out").read_text()
    shown = page[page.index('<h2 id="conflicts">') : page.index('<h2 id="counts">')]
    assert "two labels: 1 of 3" in shown
    assert "&lt;b&gt;, spleen" in shown
    assert conflicts["meanings"]["two_labels"] in shown
    assert '<a href="#conflicts">' in page
    assert "JANE" not in page + (tmp_path / "out" / "audit.json").read_text()


def test_without_a_file_of_conflicts_there_is_no_section(messy, tmp_path):
    assert messy[1].report["conflicts"] is None
    assert "#conflicts" not in audit.write_audit(messy[1], tmp_path).read_text()


@pytest.mark.parametrize("content", ["[]", "{", '{"counts": {"two_labels": 3}}', '{"counts": {}, "examples": [1]}'])
def test_a_damaged_file_of_conflicts_is_named(held_out, content, capsys):
    (held_out / "conflicts.json").write_text(content)
    assert audit.main([str(held_out)]) == 1
    assert "conflicts.json is damaged" in capsys.readouterr().err


def test_what_is_held_out_may_be_missing_in_train(held_out):
    report = _audit(held_out).report
    assert {name: entry["images"] for name, entry in report["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "zero_shot": 1,
    }
    assert [entry["label"] for entry in _entry(report, "label_not_in_train")["examples"]] == ["polyp"]


def test_the_search_for_writing_can_be_left_out(tmp_path, capsys):
    pixels = _write_on(
        decode_image(phantom(3, modality="ct", size=512).image), "12/03/2021 14:07", "ID 44719", height=24
    )
    example = dataclasses.replace(_example(image_id="w"), image=_encode(pixels), height=512, width=512)
    directory = _write(tmp_path / "r", [(example, "train")])
    for options, found in (([], 1), (["--no-writing"], 0)):
        assert audit.main([str(directory), *options]) == 0
        assert capsys.readouterr().out.count("Perhaps writing") == found
    report = json.loads((directory / "audit" / "audit.json").read_text())
    assert report["methods"]["burnt_in_text"] == "not looked for"


def test_mistakes_are_one_line(tmp_path, capsys):
    assert commands.main(["audit", str(tmp_path)]) == 1
    assert "holds no records" in capsys.readouterr().err
    assert commands.main(["adit"]) == 2
    assert "did you mean audit?" in capsys.readouterr().err
    assert commands.main(["--help"]) == 0
    assert "build" in capsys.readouterr().out
