"""Pictures of an audit's page: small JPEGs with boxes as data URIs, and bar charts as SVG."""

import base64
import dataclasses
import html
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.palette import PALETTE, Color

_DARK, _LIGHT = (18, 19, 22), (255, 255, 255)
_SIDE = 360  # pixels of a picture's longer side
_LARGEST_SCALE = 3.0  # of an image that is smaller
_QUALITY = 80  # of JPEG
_WIDTH, _HEIGHT, _AXIS, _TOP = 360, 150, 34, 16  # of a chart, in SVG units


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        uri: the JPEG as a data URI.
        width, height: of it, in pixels.
        title: the line below it.
        legend: (colour, number, text) of its phrases.
        note: a smaller line, such as the caption.
    """

    uri: str
    width: int
    height: int
    title: str
    legend: tuple[tuple[Color, int, str], ...] = ()
    note: str = ""


def draw_picture(
    pixels: np.ndarray,
    title: str,
    boxes: np.ndarray | Sequence,
    phrases: Sequence[str],
    note: str = "",
    side: int = _SIDE,
) -> Picture:
    """Makes a small picture with a box of one colour a phrase, and the phrase's number where there are several.

    Args:
        pixels: uint8[H, W, 3] RGB.
        title: the line below it.
        boxes: float[K, 4], x0 y0 x1 y1 in pixels, half-open.
        phrases: K texts.
        note: a smaller line.
    """
    scale = min(_LARGEST_SCALE, _SIDE / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    names = sorted(set(phrases))
    image = Image.fromarray(small)
    draw = ImageDraw.Draw(image)
    order = np.argsort([-(box[2] - box[0]) * (box[3] - box[1]) for box in boxes], kind="stable")
    crowded = len(boxes) > 24  # then numbers would hide the picture
    for k in map(int, order):
        if not np.isfinite(boxes[k]).all():
            continue
        x0, y0, x1, y1 = (float(value) * scale for value in boxes[k])
        number = names.index(phrases[k])
        color = PALETTE[number % len(PALETTE)]
        corners = (x0, y0, max(x0, min(x1, size[0]) - 1), max(y0, min(y1, size[1]) - 1))
        if not crowded:
            draw.rectangle((corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1), outline=_DARK)
        draw.rectangle(corners, outline=color, width=1 if crowded else 2)
        if len(names) > 1 and not crowded:
            _draw_number(draw, corners[:2], str(number + 1), color)
    legend = tuple(
        (
            PALETTE[number % len(PALETTE)],
            number + 1,
            f"{name} × {count}" if (count := phrases.count(name)) > 1 else name,
        )
        for number, name in enumerate(names)
    )
    encoded = cv2.imencode(".jpg", np.asarray(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
    uri = "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
    return Picture(uri, *size, title, legend, note)


def _draw_number(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, color: Color) -> None:
    font = ImageFont.load_default(size=12)
    width = font.getlength(text) + 5
    x, y = max(0.0, corner[0]), max(0.0, corner[1])
    draw.rectangle((x, y, x + width, y + 14), fill=color)
    draw.text((x + width / 2, y + 7), text, font=font, fill=text_color(color), anchor="mm")


def text_color(color: Color) -> Color:
    """Returns a text colour that can be read on `color`."""
    return _DARK if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 110 else _LIGHT


def bar_chart(title: str, names: Sequence[str], counts: Sequence[int], unit: str) -> str:
    """Returns an SVG bar chart as text; its colours come from the page's style sheet.

    Args:
        title: what screen readers say.
        names: of the bars, below them; where they are many every second or third is written.
        counts: heights of the bars.
        unit: of the counts, for the tip of each bar.
    """
    highest = max([*counts, 1])
    step = _WIDTH / max(len(counts), 1)
    # About seven units a character: as many names as fit.
    every = max(1, int(np.ceil(7.5 * max(map(len, names), default=1) / step)))
    room = _HEIGHT - _AXIS - _TOP
    bars = []
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        height = room * count / highest
        x, y, width = place * step + 1, _TOP + room - height, step - 2
        tip = html.escape(f"{name}: {count:,} {unit}")
        bars.append(
            f'<g><title>{tip}</title><rect class="hit" x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{room}"/>'
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/></g>'
        )
        if place % every == 0:
            half = 3.1 * len(name)
            middle = min(max(x + width / 2, half), _WIDTH - half)
            bars.append(f'<text x="{middle:.1f}" y="{_HEIGHT - _AXIS + 14}">{html.escape(name)}</text>')
    peak = int(np.argmax(counts)) if len(counts) else 0
    x = min(max((peak + 0.5) * step, 22), _WIDTH - 22)
    bars.append(f'<text class="peak" x="{x:.1f}" y="{_TOP - 4}">{highest:,}</text>' if any(counts) else "")
    bars.append(f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_TOP + room}" y2="{_TOP + room}"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT - 14}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(bars)}</svg>"
    )
