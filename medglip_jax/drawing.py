"""Boxes on images, for people: predicted ones solid, true ones dashed, one colour a phrase."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.palette import PALETTE, Color

Rectangle = tuple[float, float, float, float]

_INK, _FAINT, _PAPER, _DARK = (28, 30, 34), (105, 110, 118), (255, 255, 255), (18, 19, 22)
_ROOM = 40  # pixels of the longer side for each label in words; with more labels they show the legend's numbers
_TINT = 90  # opacity of masks, of 255
_MATCH_IOU = 0.5  # overlap from which on a predicted box stands for a true one


@dataclasses.dataclass(frozen=True)
class SheetEntry:
    """One picture of a contact sheet.

    Attributes:
        image: uint8[H, W, 3] RGB, uint8[H, W], or a Pillow image.
        title: the line above it: modality, image id.
        boxes: float[n, 4] predicted, x0 y0 x1 y1 in pixels, half-open.
        labels: n phrases.
        scores: float[n].
        true_boxes, true_labels: what is known, as `boxes` and `labels`.
        masks: what is tinted under the boxes: phrases with bool[H, W].
    """

    image: np.ndarray | Image.Image
    title: str
    boxes: np.ndarray
    labels: Sequence[str]
    scores: np.ndarray
    true_boxes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4), np.float32))
    true_labels: Sequence[str] = ()
    masks: Sequence[tuple[str, np.ndarray]] = ()

    @property
    def phrases(self) -> list[str]:
        """All phrases that need a colour."""
        return [*self.labels, *self.true_labels, *(phrase for phrase, _ in self.masks)]


def phrase_colors(pictures: Iterable[Iterable[str]]) -> dict[str, Color]:
    """Gives every phrase a colour of the palette; where these run out, phrases of one picture still differ if possible.

    Args:
        pictures: the phrases of each picture.

    Returns:
        phrase -> colour, in alphabetical order.
    """
    groups = [set(phrases) for phrases in pictures]
    chosen: dict[str, int] = {}
    for phrase in sorted(set().union(*groups)):
        beside = [chosen[other] for group in groups if phrase in group for other in group if other in chosen]
        used = list(chosen.values())
        chosen[phrase] = min(range(len(PALETTE)), key=lambda i: (beside.count(i), used.count(i), i))
    return {phrase: PALETTE[place] for phrase, place in chosen.items()}


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[float, float]:
    """Width of a text and height of a line in its font, so that all labels are as high."""
    return font.getlength(text), font.getbbox("Ag")[3]


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _lighten(color: Color) -> Color:
    """Makes dark colours light enough to be read on a dark label."""
    weight = max(0.0, (130 - _luminance(color)) / 200)
    red, green, blue = (round(value + (255 - value) * weight) for value in color)
    return red, green, blue


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _contrast(color: Color) -> Color:
    return _INK if _luminance(color) > 110 else _PAPER


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Shared area of two rectangles in square pixels."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _iou(a: Rectangle, b: Rectangle) -> float:
    shared = _overlap(a, b)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def _as_image(image: np.ndarray | Image.Image) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")


def _dashes(box: Rectangle, dash: float) -> Iterator[Rectangle]:
    """Yields the strokes of a dashed rectangle; each side begins and ends with one, so that corners are closed."""
    x0, y0, x1, y1 = box
    for (ax, ay), (bx, by) in (((x0, y0), (x1, y0)), ((x0, y1), (x1, y1)), ((x0, y0), (x0, y1)), ((x1, y0), (x1, y1))):
        pieces = 2 * max(1, round((abs(bx - ax) + abs(by - ay)) / (2 * dash))) + 1
        for piece in range(0, pieces, 2):
            start, end = piece / pieces, (piece + 1) / pieces
            yield ax + (bx - ax) * start, ay + (by - ay) * start, ax + (bx - ax) * end, ay + (by - ay) * end


class _Canvas:
    """An enlarged image on which boxes are drawn, and labels where they hide least."""

    def __init__(self, image: Image.Image, side: int):
        """Scales the image so that its longer side is `side` pixels."""
        self.scale = side / max(image.size)
        size = (max(1, round(image.width * self.scale)), max(1, round(image.height * self.scale)))
        self.image = image.resize(size, Image.Resampling.LANCZOS if self.scale < 1 else Image.Resampling.BICUBIC)
        self._draw = ImageDraw.Draw(self.image)
        self._width = max(2, round(side / 240))
        self._font = _font(max(11, side / 27))
        self._placed: list[Rectangle] = []

    def to_canvas(self, box: Sequence[float] | np.ndarray) -> Rectangle:
        """Half-open pixels of the image to the outermost pixels of the enlarged one."""
        right, bottom = self.image.width - 1, self.image.height - 1
        x0, y0, x1, y1 = (float(value) * self.scale for value in box)
        x0, y0 = min(max(x0, 0), right), min(max(y0, 0), bottom)
        return x0, y0, max(x0, min(x1 - 1, right)), max(y0, min(y1 - 1, bottom))

    def draw_mask(self, mask: np.ndarray, color: Color) -> None:
        """Tints what is inside, and draws its edge."""
        share = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(self.image.size, Image.Resampling.BILINEAR)
        inside = np.asarray(share) >= 128
        padded = np.pad(inside, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        opacity = np.where(inside & ~core, 255, np.where(inside, _TINT, 0)).astype(np.uint8)
        self.image.paste(color, mask=Image.fromarray(opacity))

    def draw_solid(self, box: Rectangle, color: Color) -> None:
        x0, y0, x1, y1 = box
        self._draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_DARK, width=1)
        self._draw.rectangle(box, outline=color, width=self._width)

    def draw_dashed(self, box: Rectangle, color: Color) -> None:
        for width, ink in ((self._width + 2, _DARK), (self._width, color)):
            for stroke in _dashes(box, 3.5 * self._width):
                self._draw.line(stroke, fill=ink, width=width)

    def draw_label(self, box: Rectangle, text: str, color: Color, *, filled: bool, boxes: Sequence[Rectangle]) -> None:
        """Writes a label at the corner of the box where it covers the fewest labels and boxes."""
        pad = max(2, self._width)
        text = _shorten(text, self._font, self.image.width - 2 * pad)
        width, height = _text_size(text, self._font)
        width, height = width + 2 * pad, height + 1.5 * pad
        x0, y0, x1, y1 = box
        options = [(x, y) for y in (y0 - height, y1, y0, y1 - height) for x in (x0, x1 - width)]
        best, least = (0.0, 0.0, width, height), float("inf")
        for rank, (x, y) in enumerate(options):
            x = min(max(x, 0), self.image.width - width)
            y = min(max(y, 0), self.image.height - height)
            place = (x, y, x + width, y + height)
            cost = 6 * sum(_overlap(place, other) for other in self._placed)
            cost += sum(_overlap(place, other) for other in boxes) / max(1, len(boxes)) + rank
            if cost < least:
                best, least = place, cost
        self._placed.append(best)
        ink = _contrast(color) if filled else _lighten(color)
        self._draw.rectangle(best, fill=color if filled else _DARK, outline=None if filled else color)
        self._draw.text((best[0] + pad, best[1] + pad / 2), text, font=self._font, fill=ink)


def _draw_entry(entry: SheetEntry, side: int, colors: Mapping[str, Color], *, numbered: bool) -> Image.Image:
    canvas = _Canvas(_as_image(entry.image), side)
    order = map(int, np.argsort(np.asarray(entry.scores), kind="stable"))
    predicted = [(canvas.to_canvas(entry.boxes[i]), entry.labels[i], float(entry.scores[i])) for i in order]
    known = [(canvas.to_canvas(box), label) for box, label in zip(entry.true_boxes, entry.true_labels, strict=True)]
    for phrase, mask in entry.masks:
        canvas.draw_mask(mask, colors[phrase])
    for box, label, _ in predicted:
        canvas.draw_solid(box, colors[label])
    for box, label in known:
        canvas.draw_dashed(box, colors[label])

    missed = [
        (box, label)
        for box, label in known
        if not any(label == other and _iou(box, found) >= _MATCH_IOU for found, other, _ in predicted)
    ]
    boxes = [box for box, *_ in predicted] + [box for box, _ in known]
    short = len(predicted) + len(missed) > side / _ROOM
    numbers = {label: f"{number}:" if numbered else "" for number, label in enumerate(colors, 1)}
    for box, label, score in reversed(predicted):  # the best choose their place first
        text = f"{numbers[label] if short else label} {score:.2f}".strip()
        canvas.draw_label(box, text, colors[label], filled=True, boxes=boxes)
    for box, label in missed:
        if text := numbers[label].rstrip(":") if short else label:
            canvas.draw_label(box, text, colors[label], filled=False, boxes=boxes)
    return canvas.image


def draw_predictions(
    image: np.ndarray | Image.Image,
    boxes: np.ndarray,
    labels: Sequence[str],
    scores: np.ndarray,
    *,
    true_boxes: np.ndarray | None = None,
    true_labels: Sequence[str] = (),
    masks: Sequence[tuple[str, np.ndarray]] = (),
    colors: Mapping[str, Color] | None = None,
    least_side: int = 640,
) -> Image.Image:
    """Draws predicted boxes (solid, with phrase and score) and true ones (dashed; with the phrase if none found it).

    Args:
        image: uint8[H, W, 3] RGB, uint8[H, W], or a Pillow image; it is not changed.
        boxes: float[n, 4], x0 y0 x1 y1 in the image's pixels, half-open.
        labels: n phrases.
        scores: float[n].
        true_boxes, true_labels: what is known, as `boxes` and `labels`.
        masks: what is tinted under the boxes: phrases with bool[H, W].
        colors: of every phrase; default: `phrase_colors` of all labels.
        least_side: images whose longer side is shorter are enlarged to it, so that labels can be read.

    Returns:
        An RGB image. Where there are too many boxes for words, labels show the score only, and missed ones have none.
    """
    picture = _as_image(image)
    truth = np.zeros((0, 4)) if true_boxes is None else true_boxes
    entry = SheetEntry(picture, "", boxes, labels, scores, truth, true_labels, masks)
    colors = colors or phrase_colors([entry.phrases])
    return _draw_entry(entry, max(least_side, *picture.size), colors, numbered=False)


def _legend(
    colors: Mapping[str, Color], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, with_truth: bool
) -> Image.Image:
    """Rows of numbered colour swatches with their phrases, then what solid and dashed mean."""
    line, gap, space = round(_text_size("", font)[1] * 1.7), 22, 7
    swatch_height, swatch_width = round(line * 0.75), round(line * 1.05)
    phrases = list(colors)
    texts = [*phrases, *(["predicted", "true"] if with_truth else [])]
    places, x, y = [], 0.0, 0
    for item, text in enumerate(texts):
        text = _shorten(text, font, width - swatch_width - space)
        needed = swatch_width + space + font.getlength(text)
        if x and (x + needed > width or item == len(phrases)):
            x, y = 0.0, y + line
        places.append((x, y, text))
        x += needed + gap
    legend = Image.new("RGB", (width, y + line), _PAPER)
    draw = ImageDraw.Draw(legend)
    for item, (x, y, text) in enumerate(places):
        top = y + (line - swatch_height) / 2
        swatch = (x, top, x + swatch_width, top + swatch_height)
        if item < len(phrases):
            color = colors[phrases[item]]
            draw.rectangle(swatch, fill=color)
            small = _font(0.6 * line)
            middle = (x + swatch_width / 2, top + swatch_height / 2)
            draw.text(middle, str(item + 1), font=small, fill=_contrast(color), anchor="mm")
        elif item == len(phrases):
            draw.rectangle(swatch, outline=_INK, width=2)
        else:
            for stroke in _dashes(swatch, 4):
                draw.line(stroke, fill=_INK, width=2)
        draw.text((x + swatch_width + space, y + line / 2), text, font=font, fill=_INK, anchor="lm")
    return legend


def contact_sheet(
    entries: Sequence[SheetEntry], path: str | os.PathLike, columns: int = 4, *, tile: int = 320
) -> pathlib.Path:
    """Writes a grid of images with predicted and true boxes, a title above each and a legend below.

    Args:
        entries: what to draw, row by row.
        path: of the image file; its folder is made if missing.
        columns: images in a row.
        tile: longer side of each image in the sheet, in pixels.

    Raises:
        ValueError: nothing to draw, or no columns.
    """
    if not entries or columns < 1:
        raise ValueError(f"a contact sheet needs at least one image and one column, not {len(entries)} and {columns}")
    columns = min(columns, len(entries))
    gap, margin, font = 16, 20, _font(max(12, tile / 23))
    head = round(_text_size("", font)[1] * 1.5)
    colors = phrase_colors(entry.phrases for entry in entries)
    pictures = [_draw_entry(entry, tile, colors, numbered=True) for entry in entries]
    rows = [range(start, min(start + columns, len(entries))) for start in range(0, len(entries), columns)]
    heights = [head + max(pictures[i].height for i in row) for row in rows]
    width = columns * tile + (columns - 1) * gap
    legend = _legend(colors, width, font, with_truth=any(len(entry.true_labels) for entry in entries))

    height = sum(heights) + gap * len(rows) + legend.height
    sheet = Image.new("RGB", (width + 2 * margin, height + 2 * margin), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (tile + gap)
            draw.text((left, top), _shorten(entries[i].title, font, tile), font=font, fill=_FAINT)
            sheet.paste(pictures[i], (left + (tile - pictures[i].width) // 2, top + head))
        top += row_height + gap
    sheet.paste(legend, (margin, top))
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return target
