import importlib
import pathlib
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError, make_region
from data_pipelines.images import store_image
from data_pipelines.schema import GroundingExample
from data_pipelines.sources import SOURCES, detect_source, load_source
from data_pipelines.sources.options import convert
from data_pipelines.volumes import SliceRule

ITS_NAME = f"{__name__}:PointFiles"


class PointFiles(Sequence[GroundingExample]):
    """NAME.png and NAME.txt with lines "x y class": the source that docs/data.md shows, in 30 lines."""

    OPTIONS = {"radius": int}  # noqa: RUF012

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown", radius: int = 2):
        self._dataset, self._modality, self._radius = dataset, modality, radius
        self._paths = sorted(folder.glob("*.txt"))
        self.unused = [str(path) for path in folder.glob("*.png") if not path.with_suffix(".txt").exists()]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> GroundingExample:
        path = self._paths[index]
        image = store_image(path.with_suffix(".png"))
        lines = path.read_text().splitlines()
        return GroundingExample(
            image=image.encoded,
            image_id=path.stem,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(self._read_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)),
        )

    def _read_line(self, line: str, where: str):
        try:
            x, y, name = line.split(maxsplit=2)
            x, y = float(x), float(y)
        except ValueError:
            raise SourceError(f"{where}: expected x, y and a class, found {line!r}") from None
        r = self._radius
        return make_region(name, np.asarray([x - r, y - r, x + r, y + r]))


def write_points(folder: pathlib.Path, *lines: str) -> pathlib.Path:
    Image.new("L", (20, 10)).save(folder / "a.png")
    (folder / "a.txt").write_text("\n".join(lines))
    return folder


def test_class_of_ones_own_is_a_source(tmp_path):
    folder = write_points(tmp_path, "5 5 RBC", "9 5 odd thing")
    (example,) = load_source(ITS_NAME, folder, dataset="points", modality="microscopy", options={"radius": 3})
    assert [(r.label, r.box.tolist()) for r in example.regions] == [
        ("red_blood_cell", [2, 2, 8, 8]),
        ("odd thing", [6, 2, 12, 8]),
    ]
    assert (example.dataset, example.modality) == ("points", "microscopy")


def test_page_shows_the_class_that_is_tested():
    page = (pathlib.Path(__file__).parents[2] / "docs/data.md").read_text()
    shown = page.split("class PointFiles", 1)[1].split("```", 1)[0]
    own = pathlib.Path(__file__).read_text().split("class PointFiles", 1)[1].split("\n\n\n", 1)[0]

    def code(text: str) -> list[str]:
        lines = [line.split("  #")[0].rstrip() for line in text.splitlines()]
        return [line for line in lines if line and '"""' not in line]

    assert code(shown) == code(own)
    assert len(code(shown)) <= 35


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cocoo", r"unknown source 'cocoo'; known: voc, .*package.module:Class"),
        ("no_such.module:Class", "there is no module 'no_such'"),
        (f"{__name__}:Points", "has no 'Points'"),
        (":Points", "expected package.module:Class"),
    ],
)
def test_unknown_source_is_an_error_that_says_what_there_is(tmp_path, name, message):
    with pytest.raises(SourceError, match=message):
        load_source(name, write_points(tmp_path), dataset="points")


def test_module_that_fails_at_import_shows_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_source.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_source("broken_source:Class", tmp_path, dataset="points")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (ITS_NAME, {"radios": 3}, r"no option 'radios'; did you mean 'radius'\?; it has radius"),
        (ITS_NAME, {"radius": "3"}, "option 'radius': expected int, found '3'"),
        (ITS_NAME, {"radius": True}, "option 'radius': expected int, found True"),
        ("voc", {"radius": 3}, "source 'voc' has no option 'radius'; it has none"),
        ("ms_cxr", {"stretch": True}, "did you mean 'stretched'"),
        ("nifti", {"step": 3}, "did you mean 'step_mm'"),
        ("dicom", {"planes": "axial"}, "option 'planes': expected tuple"),
        ("dicom", {"planes": ["oblique"]}, "source 'dicom': planes must be some of"),
        ("nifti", {"percentiles": [1, 2, 3]}, "option 'percentiles': expected tuple"),
    ],
)
def test_option_that_a_source_does_not_have_is_an_error(tmp_path, name, options, message):
    with pytest.raises(SourceError, match=message):
        load_source(name, write_points(tmp_path), dataset="points", options=options)


def test_options_of_volumes_are_the_fields_of_the_slice_rule(tmp_path, monkeypatch):
    asked = {}

    class Volumes:
        OPTIONS = {"plans": str}  # noqa: RUF012

        def __init__(self, folder, *, dataset, modality="unknown", rule=None, plans=""):
            asked.update(rule=rule, plans=plans)

    monkeypatch.setitem(globals(), "Volumes", Volumes)
    options = {"planes": ["axial", "coronal"], "step_mm": 5, "percentiles": [1, 99], "plans": "x"}
    load_source(f"{__name__}:Volumes", write_points(tmp_path), dataset="v", options=options)
    assert asked["plans"] == "x"
    assert asked["rule"] == SliceRule(planes=("axial", "coronal"), step_mm=5.0, percentiles=(1.0, 99.0))
    load_source(f"{__name__}:Volumes", tmp_path, dataset="v")
    assert asked["rule"] is None


def test_values_are_converted_or_refused_by_type():
    assert convert([1, "a"], tuple[int, str]) == (1, "a")
    assert convert(None, int | None) is None
    assert type(convert(1, float)) is float
    for value, kind in ((1.5, int), (True, float), ("a", tuple[str, ...]), ([1], tuple[str, ...]), (1, bool)):
        with pytest.raises(TypeError, match="expected"):
            convert(value, kind)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("bccd", "voc"),
        ("biomedparse_demo", "masks"),
        ("dsb2018", "instances"),
        ("sa_med2d_demo", "sa_med2d"),
        ("totalsegmentator/ct", "nifti"),
        ("totalsegmentator/mr", "nifti"),
        ("totalsegmentator/ct_dicom", "dicom"),
    ],
)
def test_each_real_folder_has_one_layout(shared_dir, folder, name):
    assert detect_source(shared_dir / "data" / folder) == name


def write_source(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes the smallest folder of a layout."""
    folder.mkdir()
    if name == "instances":
        (folder / "class.txt").write_text("nucleus")
    test = importlib.import_module(f"tests.sources.test_{'csv_boxes' if name == 'csv' else name}")
    box = np.zeros((8, 12), bool)
    box[2:5, 3:6] = True
    return {
        "voc": lambda: test.write_voc(folder, {"a": [("RBC", 1, 1, 5, 5)]}),
        "coco": lambda: test.write_coco(folder, annotations=[test.annotation()]),
        "masks": lambda: test.write_masks(folder, "a", {"a_lung": box}),
        "yolo": lambda: test.write_yolo(folder, {"a": "0 0.5 0.5 0.1 0.1"}),
        "csv": lambda: test.write_csv(folder, test.VINDR, "a,Mass,1,R8,1,2,3,4"),
        "rle_csv": lambda: test.write_rle(folder, test.SIIM, test.row("a", test.FIRST), images=("a",)),
        "labelme": lambda: test.write_labelme(folder, test.shape()),
        "instances": lambda: test.write_instances(folder),
        "colored_masks": lambda: test.write_colored(folder, {"1": "polyp", "2": "ulcer"}),
        "paired_masks": lambda: test.write_pairs(folder, mask="{}_seg.png"),
        "arrays": lambda: test.write_arrays(folder),
        "sa_med2d": lambda: test.write_sa_med2d(folder),
        "nifti": lambda: test.write_case(folder),
        "dicom": lambda: test.write_case(folder),
        "ms_cxr": lambda: test.write_ms_cxr(folder, *test.THREE_BOXES),
        "flickr_entities": lambda: test.write_flickr(folder, test.SENTENCES, test.NODULE, test.LUNG),
        "triplets": lambda: test.write_triplets(folder, test.record(bbox=[1, 1, 5, 5])),
        "reports": lambda: test.write_reports(folder, test.row("No effusion.")),
    }[name]() and folder


# What a folder does not tell; of the two of patterns, not even that it is theirs.
NEEDED = {
    "paired_masks": {"images": "images/{id}.png", "masks": {"polyp": "{id}_seg.png"}},
    "arrays": {
        "images": "Fold {id}/images/fold{id}/images.npy",
        "masks": "Fold {id}/masks/fold{id}/masks.npy",
        "channels": ["Neoplastic cells", "Dead", "Background"],
    },
    "rle_csv": {"runs": "relative", "label": "pneumothorax"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_detected_alone_and_reads_the_same_after_it_was_pickled(tmp_path, name):
    folder = write_source(name, tmp_path / "data")
    if name in ("paired_masks", "arrays"):
        with pytest.raises(
            SourceError, match=r"has no layout that is supported(.|\n)*that the options images and masks"
        ):
            detect_source(folder)
    else:
        assert detect_source(folder) == name
    source = load_source(name if name in NEEDED else "auto", folder, dataset="data", options=NEEDED.get(name))
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source) > 0
    assert [example.image_id for example in copy] == [example.image_id for example in source]
    assert copy[0].image == source[0].image
