"""Sentences about images without any box: normal findings, denied ones, and whole reports."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from data_pipelines.curate import SourceError, find_modality, hash_patient
from data_pipelines.schema import Expression, GroundingExample
from data_pipelines.sources.image_folder import ImageFolder, stem_of
from data_pipelines.sources.negation import combine, read_sentence
from data_pipelines.sources.tables import fold_name, list_tables, peek_keys, pick, read_records, root_of

# Keys as `fold_name` leaves them; the first that a record has counts.
_IMAGE = ("image", "imageid", "filename", "file", "imagename", "imagepath", "dicomid", "path", "id")
_SENTENCE = ("sentence", "text", "report", "findings", "finding", "impression", "caption", "description")
_PATIENT = ("patientid", "patient", "subjectid")
# A table with these has boxes, and is for another source.
_BOXES = {"x", "y", "w", "h", "width", "height", "xmin", "x0", "x1", "left", "bbox", "box", "boxes", "roi", "mask"}
_BOXES |= {"segmentation", "regions", "rois"}
_POLARITIES = ("positive", "negative", "normal", "uncertain")
# A full stop ends a sentence where white space and a capital follow, so that "3.5 cm" and "approx. 3" do not.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")


@dataclasses.dataclass(frozen=True)
class _Row:
    where: str
    sentence: str
    polarity: str  # one of `_POLARITIES`, or ""
    patient: str
    modality: str


def _list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    tables = [(path, peek_keys(path)) for path in list_tables(folder, ".csv", ".jsonl")]
    return [path for path, keys in tables if keys & {*_IMAGE} and keys & {*_SENTENCE} and not keys & _BOXES]


def split_sentences(text: str) -> list[str]:
    """Splits a report at line ends, and at ".", "!" and "?" before a capital."""
    return [sentence for part in _SENTENCE_END.split(text) if (sentence := " ".join(part.split()))]


class Reports(Sequence[GroundingExample]):
    """A folder with one .csv or .jsonl file of sentences, in it or in its annotations/, and the images it names.

    Keys, of which the first in a list counts; case, "_" and "-" do not matter, and other keys are not read:

        image, image_id, file_name, file, image_name, image_path, dicom_id, path, id    the image
        sentence, text, report, findings, finding, impression, caption, description     one or several sentences
        polarity                                       positive, negative, normal, uncertain, or empty
        modality; patient_id, patient, subject_id

    All sentences of an image, in their order, are its caption. A sentence that denies findings and says nothing else
    is an expression without regions, of kind "negation"; one that calls something normal is one of kind "report". So
    are all whose polarity is negative and normal. Any other sentence names what the image shows and nobody boxed: it is
    in the caption only, since an expression without regions says that the image does not show it.

    `absent` are the labels that `data_pipelines.sources.negation` finds denied and nowhere else named; sentences of the
    polarity positive or uncertain deny nothing. The option read_absent turns that off.
    """

    OPTIONS: ClassVar[dict[str, type]] = {"read_absent": bool}
    EXHAUSTIVE = False
    SUPERSEDES = ("dicom",)

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown", read_absent: bool = True):
        self._dataset, self._modality, self._read_absent = dataset, modality, read_absent
        files = _list_files(folder)
        if len(files) != 1:
            found = f"several: {', '.join(map(str, files))}; give one of them as --input" if files else "none"
            raise SourceError(
                f"{folder}: expected one .csv or .jsonl file with an image and a sentence and without boxes, "
                f"found {found}"
            )
        self._path = files[0]
        self._rows: dict[str, list[_Row]] = collections.defaultdict(list)
        for where, record in read_records(self._path):
            image_id, row = _read_row(where, record)
            self._rows[image_id].append(row)
        if not self._rows:
            raise SourceError(f"{self._path}: has no rows")
        self._ids = list(self._rows)
        self._images = ImageFolder(root_of(self._path))
        self.unused = self._images.unused(self._ids)

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_list_files(folder))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id = self._ids[index]
        rows = self._rows[image_id]
        image = self._images.store(self._images.find(image_id, rows[0].where), dataset=self._dataset)
        modality = rows[0].modality or image.modality or self._modality
        patients = {row.patient for row in rows if row.patient}
        if len(patients) > 1:
            raise SourceError(f"{rows[0].where}: image {image_id} is of several patients in {self._path}")
        sentences, readings, expressions = [], [], []
        for row in rows:
            for sentence in split_sentences(row.sentence):
                reading = read_sentence(sentence, modality)
                if row.polarity in ("positive", "uncertain"):
                    named = (*reading.absent, *reading.mentioned)
                    reading = dataclasses.replace(reading, kind="", absent=(), mentioned=named)
                kind = {"negative": "negation", "normal": "normal"}.get(row.polarity, reading.kind)
                if kind:
                    expressions.append(Expression(sentence, kind="negation" if kind == "negation" else "report"))
                sentences.append(sentence)
                readings.append(reading)
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patients.pop(), self._dataset) if patients else image.patient_id,
            modality=modality,
            spacing_mm=image.spacing_mm,
            caption=" ".join(sentences),
            absent=combine(readings) if self._read_absent else (),
            expressions=tuple(dict.fromkeys(expressions)),
        )


def _read_row(where: str, record: dict[str, Any]) -> tuple[str, _Row]:
    """Returns the image's id and what is said of it."""
    image, sentence = pick(record, _IMAGE), pick(record, _SENTENCE)
    if not isinstance(image, str) or not isinstance(sentence, str) or not sentence.strip():
        what = "image" if not isinstance(image, str) else "sentence"
        raise SourceError(
            f"{where}: has no {what}; expected one of {', '.join(_IMAGE if what == 'image' else _SENTENCE)}"
        )
    polarity = fold_name(str(record.get("polarity") or ""))
    if polarity and polarity not in _POLARITIES:
        raise SourceError(f"{where}: polarity {polarity!r} is none of {', '.join(_POLARITIES)}")
    patient = pick(record, _PATIENT)
    modality = find_modality(str(record.get("modality") or ""))
    return stem_of(image), _Row(where, sentence, polarity, "" if patient is None else str(patient), modality)
