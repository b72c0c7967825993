import json
import os
import struct
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.images import list_images, read_mask, store_image
from data_pipelines.limits import (
    Limits,
    check_inside,
    current_limits,
    is_hidden,
    list_files,
    parse_xml,
    read_bytes,
    read_json,
    read_text,
    resolve_inside,
    use_limits,
)


def png_header(width: int, height: int) -> bytes:
    """A PNG of some bytes that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def test_limits_hold_inside_the_block_and_in_its_thread_only():
    seen = []
    with use_limits(Limits(image_pixels=9)), use_limits(Limits(image_pixels=5)):
        assert current_limits().image_pixels == 5
        thread = threading.Thread(target=lambda: seen.append(current_limits()))
        thread.start()
        thread.join()
    assert seen == [current_limits()] == [Limits()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_pixels": 0}, "image_pixels must be a number above 0, not 0"),
        ({"image_pixels": True}, "image_pixels must be a number above 0, not True"),
        ({"archive_ratio": None}, "archive_ratio must be a number above 0, not None"),
        ({"volume_voxels": float("nan")}, "volume_voxels must be a number"),
        ({"volume_voxels": float("inf")}, "volume_voxels must be a number"),
        ({"follow_symlinks": 1}, "follow_symlinks must be true or false, not 1"),
    ],
)
def test_limits_that_are_none_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Limits(**fields)


def test_limits_may_be_written_with_an_exponent(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    with use_limits(Limits(image_bytes=1e9, archive_ratio=2.5)) as limits:  # type: ignore[arg-type]
        assert (type(limits.image_bytes), limits.archive_ratio) == (int, 2.5)
        assert read_bytes(tmp_path / "a", "image_bytes") == b"a"


def test_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(2**20, 2**15))
    with pytest.raises(SourceError, match=r"a.png: .*pixels \(1048576 x 32768\) are more .* raise the limit image_pix"):
        store_image(path)
    with pytest.raises(SourceError, match="image_pixels"):
        read_mask(path, (9, 9))


@pytest.mark.filterwarnings("error")
def test_limit_is_ours_and_not_pillows(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert store_image(tmp_path / "a.png").width == 40
    with use_limits(Limits(image_pixels=1599)), pytest.raises(SourceError, match="limit image_pixels"):
        store_image(tmp_path / "a.png")


def test_other_formats_are_not_tried_whatever_the_file_is_called(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.ppm")
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", (tmp_path / "a.ppm").read_bytes(), b""):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(
            SourceError, match=r"a.png: the image cannot be decoded .*no JPEG, PNG, BMP, TIFF, GIF or WebP"
        ):
            store_image(tmp_path / "a.png")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("images"), []
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"):
        Image.linear_gradient("L").resize((16, 16)).save(folder / name)
        found.append((folder / name).read_bytes())
    return found


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_image_is_an_error_and_nothing_else(tmp_path_factory, encoded, data):
    content = bytearray(data.draw(st.sampled_from(encoded)))
    places = st.integers(0, min(len(content), 200) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        with use_limits(Limits(image_pixels=10**6)):
            image = store_image(path)
        assert image.width * image.height <= 10**6
    except SourceError:
        pass


def test_pipe_and_large_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(SourceError, match="no regular file"):
        store_image(tmp_path / "a.png")
    (tmp_path / "b").write_bytes(bytes(100))
    with use_limits(Limits(image_annotation_bytes=99)), pytest.raises(SourceError, match="raise the limit image_anno"):
        read_bytes(tmp_path / "b", "image_annotation_bytes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b"1" * 10**4, "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no UTF-8"),
    ],
)
def test_bad_json_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SourceError, match=f"a.json: .*{message}"):
        read_json(tmp_path / "a.json")


def test_text_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ä": 1}), encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    with pytest.raises(SourceError, match="there is no such file"):
        read_text(tmp_path / "b.json")


def laughs(levels: int) -> str:
    """XML of entities that hold ten of the one before: 10 ** levels letters."""
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, levels))
    return f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><a>&e{levels - 1};</a>'


@pytest.mark.parametrize("content", [laughs(10), laughs(2), "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>"])
def test_document_type_is_refused(content):
    with pytest.raises(SourceError, match=r"a.xml: has a DOCTYPE"):
        parse_xml(content, "a.xml")


@pytest.mark.parametrize("content", ["<a", "", "<a>&b;</a>", b'<?xml version="1.0" encoding="klingon"?><a/>'])
def test_bad_xml_is_an_error(content):
    with pytest.raises(SourceError, match=r"a.xml: no well-formed XML"):
        parse_xml(content, "a.xml")


def test_plain_xml_is_read():
    assert parse_xml("<a><b>ü</b></a>", "a.xml").findtext("b") == "ü"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "b/../../a", "..", ".", "", "C:\\a.png", "\\\\host\\a", "\\a", "a\0b", "b/.."]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(SourceError, match="in an annotation"):
        resolve_inside(tmp_path, name)


def test_names_may_go_up_inside_the_folder(tmp_path):
    assert resolve_inside(tmp_path, "../a.png", tmp_path / "labels") == tmp_path / "a.png"
    assert resolve_inside(tmp_path, "./b//c.png") == tmp_path / "b" / "c.png"
    with pytest.raises(SourceError, match="leaves the input folder"):
        resolve_inside(tmp_path, "../../a.png", tmp_path / "labels")


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "..."]), min_size=1, max_size=7), st.sampled_from(["", "x"]))
def test_a_resolved_name_is_inside_or_refused(parts, base):
    root = os.path.abspath("root")
    path = os.path.normpath(os.path.join(root, base, *parts))
    name = "/".join(parts)
    try:
        assert os.fspath(resolve_inside(root, name, os.path.join(root, base))) == path
        assert path.startswith(root + os.sep)
    except SourceError:
        assert not path.startswith(root + os.sep) or not name or name.startswith("/")


def test_links_may_stay_inside_and_the_folder_may_be_one(tmp_path):
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "real/sub/a").write_text("a")
    (tmp_path / "real/b").symlink_to("sub/a")
    (tmp_path / "root").symlink_to("real")
    for path in ("b", "sub/a"):
        assert check_inside(tmp_path / "root", tmp_path / "root" / path) == tmp_path / "root" / path


@pytest.mark.parametrize("link", ["a", "folder"])
def test_links_that_leave_the_folder_are_refused_unless_allowed(tmp_path, link):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/a").write_text("a")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / link).symlink_to(tmp_path / "secret" / ("a" if link == "a" else ""))
    path = tmp_path / "root" / ("a" if link == "a" else "folder/a")
    with pytest.raises(SourceError, match="symbolic link leads out"):
        check_inside(tmp_path / "root", path)
    with pytest.raises(SourceError, match="symbolic link leads out"):
        resolve_inside(tmp_path / "root", path.relative_to(tmp_path / "root").as_posix())
    with use_limits(Limits(follow_symlinks=True)):
        assert check_inside(tmp_path / "root", path) == path


def test_folders_are_followed_once_and_files_each_time(tmp_path):
    for folder in ("secret", "root/sub"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a").write_text("a")
    path = tmp_path / "root/sub/b"
    with use_limits(Limits()):
        check_inside(tmp_path / "root", tmp_path / "root/sub/a")
        path.symlink_to(tmp_path / "secret/a")
        with pytest.raises(SourceError, match="leads out"):
            check_inside(tmp_path / "root", path)
        with pytest.raises(SourceError, match="leads out"):
            check_inside(tmp_path / "root", tmp_path / "root/sub/../../secret/a")
        path.unlink()
        (tmp_path / "root/link").symlink_to(tmp_path / "root")
        with pytest.raises(SourceError, match="leads out"):
            check_inside(tmp_path / "root", tmp_path / "root/link/..")


def test_neighbour_with_a_longer_name_is_outside(tmp_path):
    (tmp_path / "root-other").mkdir()
    (tmp_path / "root").mkdir()
    with pytest.raises(SourceError, match="leads out"):
        check_inside(tmp_path / "root", tmp_path / "root-other" / "a")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "thumbs.DB", "._a.png", "desktop.ini", "__MACOSX"])
def test_litter_of_file_managers_is_hidden(name):
    assert is_hidden(name)


def test_hidden_files_and_folders_are_not_listed(tmp_path):
    for name in ("b.png", "a/c.png", ".d.png", ".e/f.png", "__MACOSX/g.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list_files(tmp_path) == [tmp_path / "a/c.png", tmp_path / "b.png"]
    assert list(list_images(tmp_path)) == ["a/c", "b"]
    assert list_files(tmp_path / "nowhere") == []


def test_linked_folders_are_listed_only_if_allowed_and_circles_end(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("")
    (tmp_path / "root/link").symlink_to(tmp_path / "other")
    (tmp_path / "root/circle").symlink_to(tmp_path / "root")
    assert list_files(tmp_path / "root") == []
    with use_limits(Limits(follow_symlinks=True)):
        assert list_files(tmp_path / "root") == [tmp_path / "root/link/a.txt"]
