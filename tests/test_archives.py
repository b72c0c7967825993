import fcntl
import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import archives
from data_pipelines.archives import is_archive, open_input
from data_pipelines.curate import SourceError
from data_pipelines.limits import Limits, use_limits

FILES = {"set/images/a.png": b"a" * 3000, "set/labels/b.txt": b"b"}


def write_zip(path, files=FILES, kinds=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (kinds or {}).get(name, 0o100644) << 16
            archive.writestr(entry, content)
    return path


def write_tar(path, files=FILES, kinds=None):
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.type = (kinds or {}).get(name, tarfile.REGTYPE)
            entry.size, entry.linkname = len(content) * entry.isreg(), "/etc/passwd"
            archive.addfile(entry, io.BytesIO(content))
    return path


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["x.zip", "x.ZIP", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"])
def test_archive_becomes_the_one_folder_in_it(tmp_path, name):
    path = (write_zip if name.lower().endswith("zip") else write_tar)(tmp_path / name)
    folder = open_input(path, tmp_path / "work" / "space")
    assert contents(folder) == {"images/a.png": b"a" * 3000, "labels/b.txt": b"b"}
    assert folder.name == "set"


def test_archive_of_several_folders_is_their_parent(tmp_path):
    files = {"images/a": b"a", "labels/a": b"b", "__MACOSX/images/._a": b"c"}
    assert set(contents(open_input(write_zip(tmp_path / "a.zip", files), tmp_path))) == set(files)


def test_folders_and_other_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "coco.json").write_text("{}")
    for path in (tmp_path, tmp_path / "coco.json", tmp_path / "nowhere.zip"):
        assert not is_archive(path)
        assert open_input(path, tmp_path / "work") == path
    assert not (tmp_path / "work").exists()


def test_archive_is_unpacked_once_until_it_changes(tmp_path, monkeypatch):
    path, work = write_zip(tmp_path / "a.zip"), tmp_path / "work"
    folder = open_input(path, work)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_unpack", lambda *_: pytest.fail("unpacked again"))
        assert open_input(path, work) == folder
    os.utime(path, ns=(1, 1))
    assert open_input(path, work) != folder


def test_what_killed_processes_left_goes_and_what_is_being_unpacked_stays(tmp_path):
    path, work = write_zip(tmp_path / "a.zip"), tmp_path / "work"
    for name in ("killed", "busy", "young", "old"):
        (work / f".unpacking-{name}" / "files").mkdir(parents=True)
    (work / ".unpacking-killed" / ".lock").touch()
    os.utime(work / ".unpacking-old", (1, 1))
    (work / ".unpacking-link").symlink_to(tmp_path)
    with open(work / ".unpacking-busy" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = open_input(path, work)
        left = {".unpacking-busy", ".unpacking-young", ".unpacking-link"}
        assert {each.name for each in work.glob(".*")} == left
    assert open_input(path, work) == folder
    assert {each.name for each in work.glob(".*")} == left - {".unpacking-busy"}
    assert path.exists() and {each.name for each in folder.parents[1].iterdir()} == {"files", ".complete.json"}


def test_folder_is_locked_while_it_is_unpacked(tmp_path, monkeypatch):
    path, work = write_zip(tmp_path / "a.zip"), tmp_path / "work"
    unpack = archives._unpack

    def look_around(archive, folder):
        monkeypatch.setattr(archives, "_unpack", unpack)
        os.utime(folder.parent, (1, 1))
        assert open_input(write_zip(tmp_path / "b.zip"), work).is_dir()  # which looks for stale ones
        unpack(archive, folder)

    monkeypatch.setattr(archives, "_unpack", look_around)
    assert contents(open_input(path, work))


def test_what_was_cut_short_is_not_taken_for_complete(tmp_path, monkeypatch):
    path, work = write_zip(tmp_path / "a.zip"), tmp_path / "work"

    def stop(self, count):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives._Budget, "add_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            open_input(path, work)
    assert list(work.iterdir()) == []
    assert contents(open_input(path, work))


def refuse(path, work, message):
    with pytest.raises(SourceError, match=message):
        open_input(path, work)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "set/../../a", "C:\\a", "..\\a", "\\a"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    files = {"set/a.png": b"a", name: b"harm"}
    refuse(write_zip(tmp_path / "a.zip", files), tmp_path / "work", "leads out of the archive")
    refuse(write_tar(tmp_path / "a.tar", files), tmp_path / "work", "leads out|cannot be unpacked")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    files = {"set/a": b"", "set/b": b"b"}
    refuse(write_tar(tmp_path / "a.tar", files, {"set/a": kind}), tmp_path / "work", "'set/a' is a link or a device")
    refuse(write_zip(tmp_path / "a.zip", files, {"set/a": 0o120777}), tmp_path / "work", "is a link or a device")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_too_much_is_refused(tmp_path, write):
    path = write(tmp_path / ("a.zip" if write is write_zip else "a.tar"))
    with use_limits(Limits(archive_bytes=2999)):
        refuse(path, tmp_path / "work", "raise the limit archive_bytes")
    with use_limits(Limits(archive_files=1)):
        refuse(path, tmp_path / "work", "raise the limit archive_files")
    with use_limits(Limits(archive_bytes=3001)):
        assert contents(open_input(path, tmp_path / "work"))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_bomb_is_refused_by_its_ratio(tmp_path, monkeypatch, name):
    monkeypatch.setattr(archives, "_FREE_OF_RATIO", 10**5)
    write = write_zip if name == "a.zip" else write_tar
    path = write(tmp_path / name, {"a": bytes(10**6)})
    refuse(path, tmp_path / "work", "raise the limit archive_ratio")
    with use_limits(Limits(archive_ratio=2000)):
        assert len(contents(open_input(path, tmp_path / "work"))["a"]) == 10**6


@pytest.mark.parametrize("size", [10, 6000])
def test_size_in_a_zip_header_is_not_believed(tmp_path, size):
    path = write_zip(tmp_path / "a.zip", {"a": b"x" * 5000})
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):  # the size of the file, in both of its headers
        start = content.index(mark) + place
        content[start : start + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    refuse(path, tmp_path / "work", "cannot be unpacked|is cut short")


def test_long_names_of_tar_headers_are_not_read_into_memory(tmp_path):
    entry = tarfile.TarInfo("a")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2**33
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT) + bytes(10**5))
    refuse(tmp_path / "a.tar.gz", tmp_path / "work", "a header of 8,589,")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_archive_cut_short_is_refused(tmp_path, name, share):
    noise = np.random.default_rng(0).bytes(30_000)
    path = (write_zip if name == "a.zip" else write_tar)(tmp_path / name, {"set/a": noise, "set/b": noise})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refuse(path, tmp_path / "work", f"{name}: (.* is cut short|cannot be unpacked|holds no files)")


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_archive_is_unpacked_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(["a.zip", "a.tar", "a.tar.gz"]))
    path = (write_zip if name == "a.zip" else write_tar)(folder / name)
    content = bytearray(path.read_bytes())
    places = st.integers(0, min(len(content), 600) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[place] = value
    path.write_bytes(content)
    try:
        unpacked = open_input(path, folder / "work")
        assert unpacked.is_relative_to(folder / "work")
    except SourceError:
        assert list((folder / "work").iterdir()) == []
    assert {path.name for path in folder.iterdir()} == {name, "work"}


def test_same_name_twice_and_no_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    refuse(tmp_path / "a.tar", tmp_path / "work", "holds 'a' twice")
    refuse(write_zip(tmp_path / "a.zip", {}), tmp_path / "work", "holds no files")


def test_unpacked_images_are_a_source(tmp_path):
    from data_pipelines.sources.masks import MaskFolder

    files = {}
    for name in ("images/a.png", "masks/a_polyp.png"):
        stream = io.BytesIO()
        Image.new("L", (8, 8), 255).save(stream, "PNG")
        files[f"set/{name}"] = stream.getvalue()
    (example,) = MaskFolder(open_input(write_zip(tmp_path / "a.zip", files), tmp_path / "work"), dataset="d")
    assert [region.phrase for region in example.regions] == ["polyp"]
