import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines import json_lists
from data_pipelines.curate import SourceError
from data_pipelines.json_lists import load_places, read_members

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
contents = st.fixed_dictionaries(
    {"a": st.lists(values, max_size=4), "b": st.lists(values, max_size=4)}, optional={"c": values, 'ö"': values}
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(json_lists, "_PIECE", 5)


@given(content=contents, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), mark=st.booleans())
@example(content={"a": [1.3510798882109898e16], "b": [], "c": None}, ascii_only=True, indent=None, mark=True)
def test_members_are_those_of_json_wherever_the_pieces_end(tmp_path_factory, content, ascii_only, indent, mark):
    path = tmp_path_factory.getbasetemp() / "lists.json"
    text = json.dumps(content, ensure_ascii=ascii_only, indent=indent)
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8", errors="surrogatepass")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a lone surrogate is no UTF-8
        with pytest.raises(SourceError, match="no UTF-8"):
            list(read_members(path, ("a", "b"), "annotation_bytes"))
        return
    members = list(read_members(path, ("a", "b"), "annotation_bytes"))
    assert [(each.key, each.value) for each in members] == [
        (key, value) for key in content if key in "ab" for value in content[key]
    ]
    assert load_places(path, [(each.start, each.stop) for each in members]) == [each.value for each in members]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON .* at byte 0"),
        ("[]", "no valid JSON .* at byte 0"),
        ('{"a": [1, 2', "no valid JSON"),
        ('{"a": [1 2]}', "no valid JSON .* at byte 9"),
        ('{"a": [1,]}', "no valid JSON .* at byte 9"),
        ('{"a": [{"b": tru}]}', "no valid JSON .* at byte 13"),
        ('{"a": []} {', "Extra data at byte 10"),
        ('{"a": [], "a": []}', "has 'a' twice"),
        ('{"a": {}}', "its 'a' is no list"),
        ('{"b": []}', "has no list 'a'"),
        ('{"a": [' + "[" * 10**5, "nested too deeply"),
        ('{"a": [' + "9" * 5000 + "]}", "no valid JSON"),
    ],
)
def test_bad_file_is_an_error_that_names_the_place(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=f"a.json: .*{message}"):
        list(read_members(tmp_path / "a.json", ("a",), "annotation_bytes"))


def test_file_that_changed_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [{"id": 1}]}')
    (member,) = read_members(path, ("a",), "annotation_bytes")
    path.write_text('{"a": []}')
    with pytest.raises(SourceError, match="has changed"):
        load_places(path, [(member.start, member.stop)])
