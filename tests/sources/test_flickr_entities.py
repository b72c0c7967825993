import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.sources import detect_source, load_source
from data_pipelines.sources.flickr_entities import parse_sentence

SENTENCES = """[/EN#1/findings A small nodule] in [/EN#2/anatomy the left lung] .
[/EN#1/findings The nodule] and [/EN#0/notvisual nothing else] beside [/EN#3/scene the chest] .
"""


def thing(*names, box=None):
    inner = "".join(f"<name>{name}</name>" for name in names)
    if box:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        inner += f"<bndbox>{''.join(f'<{key}>{value}</{key}>' for key, value in corners)}</bndbox>"
    else:
        inner += "<nobndbox>1</nobndbox><scene>1</scene>"
    return f"<object>{inner}</object>"


NODULE, LUNG = thing("1", box=(3, 4, 6, 8)), thing("2", box=(1, 1, 20, 10))


def write_flickr(folder, sentences=SENTENCES, *things, name="12"):
    for place in ("Sentences", "Annotations", "images"):
        (folder / place).mkdir(exist_ok=True, parents=True)
    Image.new("L", (20, 10)).save(folder / "images" / f"{name}.jpg")
    (folder / "Sentences" / f"{name}.txt").write_text(sentences, encoding="utf-8")
    size = "<size><width>20</width><height>10</height></size>"
    xml = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(things)}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(xml)
    return folder


def read(folder):
    return load_source("auto", folder, dataset="entities", modality="ct")


def grounded(example):
    """(words of the spans, labels that they ground to) of every expression."""
    return [
        (" ".join(e.text[start:end] for start, end in e.spans), [example.regions[place].label for place in e.regions])
        for e in example.expressions
    ]


def test_marked_words_ground_to_the_boxes_of_their_entity(tmp_path):
    (example,) = read(write_flickr(tmp_path, SENTENCES, NODULE, LUNG, thing("3")))
    assert [region.box.tolist() for region in example.regions] == [[2, 3, 6, 8], [0, 0, 20, 10]]
    assert grounded(example) == [
        ("A small nodule", ["small nodule"]),
        ("the left lung", ["left_lung"]),
        ("The nodule", ["small nodule"]),
    ]
    assert [e.text for e in example.expressions][1:] == [
        "A small nodule in the left lung .",
        "The nodule and nothing else beside the chest .",
    ]


def test_caption_is_the_sentence_that_names_most_regions(tmp_path):
    lines = SENTENCES.splitlines()
    (example,) = read(write_flickr(tmp_path, "\n".join(reversed(lines)), NODULE, LUNG))
    assert example.caption == "A small nodule in the left lung ."
    words = [[example.caption[start:end] for start, end in region.spans] for region in example.regions]
    assert words == [["A small nodule"], ["the left lung"]]


def test_several_boxes_of_an_entity_and_several_entities_of_a_box(tmp_path):
    sentences = "[/EN#1/x two cysts] with [/EN#2/x fluid] ."
    things = (thing("1", "2", box=(1, 1, 3, 3)), thing("1", box=(5, 5, 9, 9)))
    (example,) = read(write_flickr(tmp_path, sentences, *things))
    assert [e.regions for e in example.expressions] == [(0, 1), (0,)]
    assert example.regions[0].spans == ((0, 9), (15, 20))


def test_boxes_that_no_sentence_names_are_dropped_and_counted(tmp_path):
    source = read(write_flickr(tmp_path, SENTENCES, NODULE, thing("9", box=(1, 1, 2, 2))))
    assert [region.label for region in source[0].regions] == ["small nodule"]
    assert source.dropped == {"entity that no sentence names": 1}


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.text(st.characters(exclude_characters="[]\n\r"), max_size=8)), max_size=5)
)
def test_spans_hold_the_marked_words(parts):
    marked = "".join(f"{words}[/EN#{entity}/a/b {words}]" for entity, words in parts)
    sentence = parse_sentence(marked)
    assert "[/EN" not in sentence.text
    found = sorted(sentence.text[a:b] for spans in sentence.entities.values() for a, b in spans)
    assert found == sorted(words.strip() for _, words in parts if words.strip())


def test_layout_is_not_taken_for_pascal_voc(tmp_path):
    assert detect_source(write_flickr(tmp_path, SENTENCES, NODULE)) == "flickr_entities"
    for path in (tmp_path / "Sentences").iterdir():
        path.unlink()
    assert detect_source(tmp_path) == "voc"


@pytest.mark.parametrize(
    ("thing_", "message"),
    [
        (thing("1", box=("x", 1, 2, 3)), r"12.xml: .*is no number"),
        ("<object>", r"12.xml: no well-formed XML"),
    ],
)
def test_bad_annotation_is_an_error_that_names_the_file(tmp_path, thing_, message):
    source = read(write_flickr(tmp_path, SENTENCES, thing_))
    with pytest.raises(SourceError, match=message):
        source[0]


def test_files_without_counterpart_are_unused(tmp_path):
    write_flickr(tmp_path, SENTENCES, NODULE)
    (tmp_path / "Sentences/13.txt").write_text("a")
    (tmp_path / "Annotations/14.xml").write_text("<annotation/>")
    Image.new("L", (20, 10)).save(tmp_path / "images/15.jpg")
    source = read(tmp_path)
    assert len(source) == 1
    assert [path.rsplit("/", 1)[1] for path in source.unused] == ["13.txt", "14.xml", "15.jpg"]
    (tmp_path / "Sentences/12.txt").rename(tmp_path / "Sentences/16.txt")
    with pytest.raises(SourceError, match="of the same names, found 2 and 2 files"):
        load_source("flickr_entities", tmp_path, dataset="entities")
