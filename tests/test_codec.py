import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from tensorflow_datasets.proto import tf_example_generated_pb2

from data_pipelines.codec import RecordsError, encode_example, parse_example
from data_pipelines.schema import GRANULARITIES, MODALITIES, Expression, GroundingExample, Region

LUNG = Region(
    box=np.asarray([0.5, 1, 2.25, 3], np.float32),
    phrase="left lung",
    label="left_lung",
    granularity="organ",
    parent="lung",
    mask={"size": [5, 7], "counts": b"07S1"},
    spans=((4, 13), (20, 22)),
)
CHEST = GroundingExample(
    image=b"\x89PNG",
    image_id="chest",
    dataset="set",
    height=5,
    width=7,
    patient_id="p",
    modality="xray",
    spacing_mm=(0.5, 0.25),
    caption="The left lung; also it.",
    regions=(LUNG, dataclasses.replace(LUNG, phrase="nodule", mask=None, spans=(), iscrowd=True)),
    absent=("fracture",),
    expressions=(
        Expression("the nodule in the left lung", (1, 0), ((4, 10), (18, 27)), "referring"),
        Expression("no fracture", kind="absent"),
    ),
)


def test_masks_are_left_out_if_asked_to():
    example = parse_example(encode_example(CHEST), masks=False)
    assert [region.mask for region in example.regions] == [None, None]
    assert [region.spans for region in example.regions] == [region.spans for region in CHEST.regions]


LISTS = ("absent", "caption_spans", "expression_regions", "expression_spans")  # any number of values will do


@st.composite
def examples(draw):
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    masks = arrays(np.uint8, (height, width), elements=st.integers(0, 1))
    text = st.text() | st.sampled_from(["", "Łung \N{COMBINING ACUTE ACCENT}", "左肺", "🫁 left lung", "a\x00b\n"])
    caption = draw(text)
    ends = st.tuples(*[st.integers(0, len(caption))] * 2).map(lambda pair: tuple(sorted(pair)))
    region = st.builds(
        Region,
        box=arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
        phrase=text,
        label=text,
        granularity=st.sampled_from(GRANULARITIES),
        parent=text,
        mask=st.none() | masks.map(lambda mask: dict(coco_mask.encode(np.asfortranarray(mask)))),
        iscrowd=st.booleans(),
        spans=st.lists(ends, max_size=3).map(tuple),
    )
    regions = tuple(draw(st.lists(region, max_size=4)))
    expression = st.builds(
        Expression,
        text=text,
        regions=st.lists(st.integers(0, len(regions) - 1), max_size=3).map(tuple) if regions else st.just(()),
        spans=st.lists(st.tuples(*[st.integers(0, 9)] * 2), max_size=3).map(tuple),
        kind=text,
    )
    return GroundingExample(
        image=draw(st.binary()),
        image_id=draw(text),
        dataset=draw(text),
        height=height,
        width=width,
        patient_id=draw(text),
        modality=draw(st.sampled_from(MODALITIES)),
        spacing_mm=draw(st.tuples(*[st.floats(0, 100, width=32)] * 2)),
        caption=caption,
        regions=regions,
        absent=tuple(draw(st.lists(text, max_size=3))),
        expressions=tuple(draw(st.lists(expression, max_size=3))),
    )


def assert_equal(found: GroundingExample, expected: GroundingExample) -> None:
    without = [dataclasses.replace(example, regions=()) for example in (found, expected)]
    assert without[0] == without[1]
    for region, original in zip(found.regions, expected.regions, strict=True):
        assert region.box.dtype == np.float32
        np.testing.assert_array_equal(region.box, original.box)
        assert dataclasses.replace(region, box=None) == dataclasses.replace(original, box=None)


@given(examples())
def test_example_comes_back_as_it_was_and_encodes_to_the_same_bytes(example):
    record = encode_example(example)
    parsed = parse_example(record)
    assert_equal(parsed, example)
    assert encode_example(parsed) == record


def test_spans_stay_with_their_region_and_in_their_order():
    spans = (((0, 1),), (), ((5, 9), (2, 3)))
    regions = tuple(dataclasses.replace(LUNG, spans=group) for group in spans)
    parsed = parse_example(encode_example(dataclasses.replace(CHEST, regions=regions)))
    assert tuple(region.spans for region in parsed.regions) == spans


def test_image_without_regions_is_kept():
    normal = dataclasses.replace(CHEST, regions=(), absent=(), expressions=())
    assert_equal(parse_example(encode_example(normal)), normal)


def changed(change) -> bytes:
    """The record of `CHEST` after `change(features)`."""
    message = tf_example_generated_pb2.Example.FromString(encode_example(CHEST))
    change(message.features.feature)
    return message.SerializeToString()


FEATURES = sorted(tf_example_generated_pb2.Example.FromString(encode_example(CHEST)).features.feature)


@pytest.mark.parametrize("name", FEATURES)
def test_missing_feature_is_named(name):
    with pytest.raises(RecordsError, match=rf"malformed record: it has no feature '{name}'"):
        parse_example(changed(lambda features: features.pop(name)))


@pytest.mark.parametrize("name", FEATURES)
def test_feature_of_another_kind_is_named(name):
    def change(features):
        kind = "bytes_list" if features[name].WhichOneof("kind") != "bytes_list" else "float_list"
        getattr(features[name], kind).SetInParent()

    with pytest.raises(RecordsError, match=rf"malformed record: feature '{name}' is a \w+_list, expected a \w+_list"):
        parse_example(changed(change))


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in LISTS])
def test_wrong_number_of_values_is_named(name):
    def change(features):
        values = getattr(features[name], features[name].WhichOneof("kind")).value
        values.append(values[0])

    with pytest.raises(RecordsError, match=r"malformed record: feature '\S+' has \d values, expected \d"):
        parse_example(changed(change))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("caption", b"\xff", "feature 'caption' is not UTF-8"),
        ("absent", b"\xc3", "feature 'absent' is not UTF-8"),
        ("modality", b"telepathy", "unknown modality 'telepathy'; known: unknown, xray, ct"),
        ("regions/granularity", b"huge", "unknown granularity 'huge'; known: region, organ"),
    ],
)
def test_text_that_is_not_allowed_is_named(name, value, complaint):
    with pytest.raises(RecordsError, match=f"malformed record: {complaint}"):
        parse_example(changed(lambda features: features[name].bytes_list.value.__setitem__(0, value)))


def test_record_of_an_earlier_build_has_no_expressions():
    def change(features):
        for name in [name for name in features if name.startswith("expression")]:
            del features[name]

    assert_equal(parse_example(changed(change)), dataclasses.replace(CHEST, expressions=()))


@pytest.mark.parametrize("name", ["caption_spans", "expression_spans"])
@pytest.mark.parametrize("triples", [[0, 1], [2, 0, 1], [-1, 0, 1]])
def test_spans_of_nothing_are_an_error(name, triples):
    def change(features):
        features[name].int64_list.value[:] = triples

    with pytest.raises(RecordsError, match=f"malformed record: '{name}' are not"):
        parse_example(changed(change))


@pytest.mark.parametrize("pairs", [[0], [2, 0], [0, 2], [0, -1]])
def test_expression_of_no_region_is_an_error(pairs):
    def change(features):
        features["expression_regions"].int64_list.value[:] = pairs

    with pytest.raises(RecordsError, match=r"malformed record: ('expression_regions' are not|the expression 'the nod)"):
        parse_example(changed(change))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"modality": "telepathy"}, "chest: unknown modality 'telepathy'"),
        ({"regions": (dataclasses.replace(LUNG, granularity="huge"),)}, "chest: unknown granularity 'huge'"),
        ({"regions": (dataclasses.replace(LUNG, box=np.zeros((2, 2))),)}, r"chest: a box has shape \(2, 2\)"),
        ({"height": 6}, r"chest: a mask has size \[5, 7\], the image \[6, 7\]"),
        ({"expressions": (Expression("it", (2,)),)}, "chest: the expression 'it' names region 2, and .* has 2 regions"),
        ({"caption": "a\ud83d"}, r"'chest': caption 'a\\ud83d' cannot be written as UTF-8"),
        ({"image_id": "caf\udce9.png"}, r"'caf\\udce9.png': image_id 'caf\\udce9.png' cannot be written"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(changes, complaint):
    with pytest.raises(RecordsError, match=complaint):
        encode_example(dataclasses.replace(CHEST, **changes))


@given(st.data())
def test_record_cut_short_anywhere_is_a_clear_error(data):
    record = encode_example(CHEST)
    end = data.draw(st.integers(0, len(record) - 1))
    with pytest.raises(RecordsError, match="malformed record"):
        parse_example(record[:end])
