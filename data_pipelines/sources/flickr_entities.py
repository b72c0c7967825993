"""Flickr30k Entities (Plummer et al. 2015): sentences whose marked words have boxes, for any kind of images."""

import collections
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, make_region
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources.image_folder import ImageFolder
from data_pipelines.sources.voc import half_open_box

_MARK = re.compile(r"\[/EN#(\d+)(?:/\S*)? ([^\]]*)\]")
_ARTICLE = re.compile(r"\A(?:an?|the)\s+", re.IGNORECASE)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_HEAD = 2**16  # characters looked at to tell whether sentences have marks
_UNNAMED = "entity that no sentence names"

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence without its marks.

    Attributes:
        text: as people read it.
        entities: for each entity id the characters (start, end) of its words in the text, half-open.
    """

    text: str
    entities: dict[str, Spans]


def parse_sentence(marked: str) -> Sentence:
    """Reads "[/EN#12/people A man] in [/EN#13/clothing a hat] ."."""
    text, entities, start = "", collections.defaultdict(list), 0
    for mark in _MARK.finditer(marked):
        text += marked[start : mark.start()]
        words = mark[2].strip()
        if words:
            entities[mark[1]].append((len(text), len(text) + len(words)))
        text += words
        start = mark.end()
    return Sentence(text + marked[start:], {entity: tuple(spans) for entity, spans in entities.items()})


def _read_boxes(path: pathlib.Path) -> tuple[list[tuple[tuple[str, ...], np.ndarray]], tuple[int, int]]:
    """Returns (ids of the entities in each box, box) and the image's (height, width), 0 if it is not told."""
    root = limits.parse_xml(limits.read_bytes(path, "image_annotation_bytes"), path)
    try:
        size = root.find("size")
        height, width = (int(size.findtext(side) or 0) if size is not None else 0 for side in ("height", "width"))
        boxes = []
        for thing in root.findall("object"):
            bounds = thing.find("bndbox")
            names = tuple((name.text or "").strip() for name in thing.findall("name"))
            if bounds is not None:  # else it is the whole scene, or cannot be seen
                corners = [float(bounds.findtext(corner) or "") for corner in _CORNERS]
                boxes.append((names, half_open_box(*corners)))
    except ValueError as error:
        raise SourceError(f"{path}: the image's size or a box is no number ({error})") from None
    return boxes, (height, width)


@dataclasses.dataclass(frozen=True)
class _Annotation:
    sentences: list[Sentence]
    boxes: list[tuple[tuple[str, ...], np.ndarray]]  # with the entities that sentences name
    size: tuple[int, int]  # height and width of the image
    unnamed: int  # boxes of other entities


class FlickrEntities(Sequence[GroundingExample]):
    """Sentences/ID.txt, Annotations/ID.xml, and an image ID anywhere in the folder, as JPEG, PNG or DICOM.

    A text file has a sentence a line, in which [/EN#12/people A man] marks the words of entity 12; the XML file has
    boxes as Pascal VOC's, with one or several entity ids as <name>. A box is a region, whose name is the words of its
    entity where they come first, without article. Each entity with boxes in a sentence is an expression: the sentence,
    the boxes, and the spans of the entity's words. Entities that are the whole scene or have no box are words only.

    The example's caption is the sentence that names most regions, with their spans. Boxes whose entities no sentence
    names are dropped and counted.
    """

    EXHAUSTIVE = False
    SUPERSEDES = ("voc", "dicom")

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        annotations = {path.stem: path for path in limits.list_files(folder / "Annotations", ".xml")}
        sentences = {path.stem: path for path in limits.list_files(folder / "Sentences", ".txt")}
        self._files = {name: (path, annotations[name]) for name, path in sentences.items() if name in annotations}
        self._ids = list(self._files)
        if not self._ids:
            raise SourceError(
                f"{folder}: expected Sentences/ID.txt and Annotations/ID.xml of the same names, found "
                f"{len(sentences)} and {len(annotations)} files"
            )
        self._images = ImageFolder(folder)
        self.unused = [str(path) for name, path in sentences.items() if name not in annotations]
        self.unused += [str(path) for name, path in annotations.items() if name not in sentences]
        self.unused += self._images.unused(self._ids)

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        if not (folder / "Annotations").is_dir():
            return False
        first = next(limits.walk_files(folder / "Sentences", ".txt"), None)
        return first is not None and "[/EN#" in limits.read_head(first, _HEAD)

    @property
    def dropped(self) -> collections.Counter[str]:
        """Counts of boxes that were left out, by reason; reads all text files."""
        return collections.Counter({_UNNAMED: sum(self._read(name).unnamed for name in self._ids)})

    def _read(self, name: str) -> "_Annotation":
        text, xml = self._files[name]
        lines = limits.read_text(limits.check_inside(self._folder, text)).split("\n")
        sentences = [parse_sentence(line.strip()) for line in lines if line.strip()]
        named = {entity for sentence in sentences for entity in sentence.entities}
        boxes, size = _read_boxes(limits.check_inside(self._folder, xml))
        kept = [(tuple(e for e in entities if e in named), box) for entities, box in boxes if named & set(entities)]
        return _Annotation(sentences, kept, size, unnamed=len(boxes) - len(kept))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        name = self._ids[index]
        read, xml = self._read(name), self._files[name][1]
        sentences, boxes, size = read.sentences, read.boxes, read.size
        path = self._images.find(name, str(xml))
        image = self._images.store(path, dataset=self._dataset, annotated_size=size if all(size) else None)
        places: dict[str, list[int]] = collections.defaultdict(list)
        for place, (entities, _) in enumerate(boxes):
            for entity in entities:
                places[entity].append(place)
        expressions = [
            Expression(sentence.text, tuple(places[entity]), spans)
            for sentence in sentences
            for entity, spans in sentence.entities.items()
            if entity in places
        ]
        caption = max(
            sentences, default=Sentence("", {}), key=lambda s: len({p for e in s.entities for p in places.get(e, ())})
        )
        return GroundingExample(
            image=image.encoded,
            image_id=name,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=image.patient_id,
            modality=image.modality or self._modality,
            spacing_mm=image.spacing_mm,
            caption=caption.text,
            regions=tuple(self._make_region(entities, box, sentences, caption, xml) for entities, box in boxes),
            expressions=tuple(expressions),
        )

    @staticmethod
    def _make_region(
        entities: Sequence[str], box: np.ndarray, sentences: Sequence[Sentence], caption: Sentence, where: pathlib.Path
    ) -> Region:
        sentence, entity = next((s, e) for s in sentences for e in entities if e in s.entities)
        start, end = sentence.entities[entity][0]
        words = sentence.text[start:end]
        spans = itertools.chain.from_iterable(caption.entities.get(each, ()) for each in entities)
        try:
            return make_region(_ARTICLE.sub("", words, count=1) or words, box, spans=tuple(sorted(set(spans))))
        except SourceError as error:
            raise SourceError(f"{where}: entity {entity}: {error}") from None
