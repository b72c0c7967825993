"""What phantoms are drawn with: deformed shapes, textures, and a scene that keeps a mask of every region it paints."""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines.schema import Region
from data_pipelines.taxonomy import load_taxonomy

Color = float | Sequence[float] | np.ndarray  # a grey value or RGB, 0 to 1
Points = Sequence[Sequence[float]] | Sequence[np.ndarray] | np.ndarray  # [N, 2], x and y

_TILE_MARGIN = 256  # pixels by which a noise tile is larger than the image that takes a random crop of it
_COARSE_BLUR = 3.0  # pixels of correlation from which on noise is drawn coarse and enlarged
_FIXED_POINT_BITS = 4  # of polygon corners: a sixteenth of a pixel
_WARP_FREQUENCY = 2.7  # radians a scene unit
_LEAST_AREA = 6  # pixels; anything smaller is not a region that could be found
_LEAST_RADIUS = 1.6  # pixels, of lumps: small pictures show small lesions too
_MARGIN = 4  # pixels of a picture of 256 that stay free between two lesions


@functools.lru_cache(maxsize=64)
def _spline_matrix(count: int, closed: bool, steps: int) -> np.ndarray:
    """Returns float64[N, count], which takes control points to the points of their Catmull-Rom curve."""
    t = (np.arange(steps) / steps)[:, None]  # [S, 1]
    basis = 0.5 * np.concatenate(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1
    )  # [S, 4]
    segments = count if closed else count - 1
    matrix = np.zeros((segments, steps, count))
    for segment in range(segments):
        for offset in range(4):
            point = segment + offset - 1
            point = point % count if closed else min(max(point, 0), count - 1)
            matrix[segment, :, point] += basis[:, offset]
    matrix = matrix.reshape(segments * steps, count)
    return matrix if closed else np.concatenate([matrix, np.eye(count)[-1:]])


def spline(points: Points, *, closed: bool = True, steps: int = 6) -> np.ndarray:
    """Returns Catmull-Rom curves through `points` [..., P, 2] as float64[..., N, 2], `steps` points a segment."""
    points = np.asarray(points, np.float64)
    return _spline_matrix(points.shape[-2], closed, steps) @ points


def mirror(points: Points, sign: float) -> np.ndarray:
    """Returns the points with x times `sign`: one outline serves both sides."""
    return np.asarray(points, np.float64) * (sign, 1)


def half_plane(x: float, sign: float) -> np.ndarray:
    """Returns float64[N, 2], the outline of all that lies right (`sign` 1) or left (-1) of `x`, as poses bend it."""
    y = np.linspace(-1.5, 1.5, 16)
    edge = np.stack([np.full(16, x), y], 1)
    return np.concatenate([edge, [(x + 3 * sign, 1.5), (x + 3 * sign, -1.5)]])


@functools.lru_cache(maxsize=64)
def _harmonics(low: int, high: int, points: int) -> np.ndarray:
    """Returns float64[2 K, points]: cosines, then sines, of the frequencies `low` to `high` - 1 around a circle."""
    angles = np.arange(low, high)[:, None] * np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, points: int = 40) -> np.ndarray:
    """Returns float64[points, 2], an ellipse with half-axes `rx`, `ry`, turned by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)
    return _harmonics(1, 2, points).T @ np.array([[c * rx, s * rx], [-s * ry, c * ry]]) + (x, y)


def blob(
    rng: np.random.Generator,
    x: float,
    y: float,
    rx: float,
    ry: float,
    *,
    roughness: float = 0.1,
    harmonics: tuple[int, int] = (2, 6),
    angle: float = 0.0,
    points: int = 48,
) -> np.ndarray:
    """Returns float64[points, 2], an ellipse whose radius wobbles by about `roughness` at the given frequencies."""
    waves = _harmonics(*harmonics, points)
    radius = 1 + rng.standard_normal(len(waves)) @ waves * (roughness / math.sqrt(len(waves)))
    return ellipse(0, 0, rx, ry, angle, points) * np.maximum(radius, 0.2)[:, None] + (x, y)


@functools.lru_cache(maxsize=32)
def noise_tile(side: int, blur: float = 0.0) -> np.ndarray:
    """Returns float32[side, side] of Gaussian noise, variance 1, correlated over `blur` pixels; do not write to it."""
    rng = np.random.Generator(np.random.PCG64(side))
    if blur < _COARSE_BLUR:
        tile = rng.standard_normal((side, side), dtype=np.float32)
        tile = cv2.GaussianBlur(tile, (0, 0), blur) if blur else tile
    else:  # the same look as a wide filter's, without its cost
        cells = math.ceil(side / (2 * blur)) + 1
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        tile = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    return tile / tile.std()


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns x, y, width and height of what a mask covers; None where that is too little to be found."""
    x, y, w, h = cv2.boundingRect(mask)
    if w < 2 or h < 2 or cv2.countNonZero(mask[y : y + h, x : x + w]) < _LEAST_AREA:
        return None
    return x, y, w, h


class Scene:
    """A picture in the making.

    Positions are in scene units: the picture spans -1 to 1, x to the right, y down. The pose (shift, turn, scale and a
    smooth warp, all random) takes them to pixels, the same for all shapes, so that what is inside stays inside.

    Attributes:
        rng: source of all randomness.
        size: side of the picture in pixels.
        image: float32[C, size, size], about 0 to 1; C is 1 (grey) or 3 (RGB). Planes, since blending is faster on them.
        regions: what was added, in order.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        size: int,
        background: Color,
        *,
        turn: float = 0.1,
        shift: float = 0.06,
        scale: tuple[float, float] = (0.85, 1.05),
        warp: float = 0.03,
    ):
        self.rng = rng
        self.size = size
        color = np.asarray(background, np.float32).reshape(-1, 1, 1)
        self.image = np.empty((len(color), size, size), np.float32)
        self.image[:] = color
        self.regions: list[Region] = []
        self.zoom = rng.uniform(*scale)
        angle = rng.uniform(-turn, turn)
        stretch = self.zoom * rng.uniform(0.95, 1.05, 2)
        c, s = np.cos(angle), np.sin(angle)
        matrix = np.array([[c, s], [-s, c]]) * stretch * size / 2
        offset = (rng.uniform(-shift, shift, 2) + 1) * size / 2
        self._matrix = matrix * (1 << _FIXED_POINT_BITS)
        self._offset = (offset - 0.5) * (1 << _FIXED_POINT_BITS) + 0.5  # of pixel centres, rounded
        self._warp = rng.uniform(-warp, warp, 2)
        self._phase = rng.uniform(0, 2 * np.pi, 2)
        self._lesions = np.zeros((size, size), np.uint8)  # where they are

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def _warped(self, points: Points) -> np.ndarray:
        p = np.asarray(points, np.float64)
        waves = np.sin(p[:, ::-1] * _WARP_FREQUENCY + self._phase)
        waves *= self._warp
        waves += p
        return waves

    def _corners(self, points: np.ndarray) -> np.ndarray:
        """Takes points [N, 2] in scene units to cv2's fixed-point pixels, int32[N, 2]."""
        return (self._warped(points) @ self._matrix + self._offset).astype(np.int32)

    def length(self, units: float) -> float:
        """Takes a length in scene units to pixels."""
        return units * self.zoom * self.size / 2

    def fill(self, points: np.ndarray, within: np.ndarray | None = None, *, posed: bool = True) -> np.ndarray:
        """Returns uint8[size, size], 1 inside the polygon and `within`. `posed` False: points are pixels already."""
        corners = self._corners(points) if posed else ((points - 0.5) * (1 << _FIXED_POINT_BITS) + 0.5).astype(np.int32)
        mask = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(mask, [corners], 1, shift=_FIXED_POINT_BITS)
        return mask if within is None else cv2.bitwise_and(mask, within)

    def fill_all(self, outlines: Sequence[np.ndarray], within: np.ndarray | None = None) -> np.ndarray:
        """Returns uint8[size, size], 1 inside any of the polygons (and `within`): one paint for many shapes."""
        mask = np.zeros((self.size, self.size), np.uint8)
        for outline in outlines:
            cv2.fillPoly(mask, [self._corners(outline)], 1, shift=_FIXED_POINT_BITS)
        return mask if within is None else cv2.bitwise_and(mask, within)

    def stroke(self, curves: Sequence[np.ndarray] | np.ndarray, width: float) -> np.ndarray:
        """Returns uint8[size, size], 1 on the open curves [..., N, 2], `width` scene units wide, a pixel at least."""
        corners = self._corners(np.concatenate(curves))
        if isinstance(curves, np.ndarray):
            parts = list(corners.reshape(curves.shape))
        else:
            ends = np.cumsum([len(curve) for curve in curves]).tolist()
            parts = [corners[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        mask = np.zeros((self.size, self.size), np.uint8)
        cv2.polylines(mask, parts, False, 1, max(1, round(self.length(width))), shift=_FIXED_POINT_BITS)
        return mask

    def paint(
        self,
        mask: np.ndarray,
        color: Color,
        *,
        softness: float = 0.0,
        opacity: float = 1.0,
        mottle: tuple[float, int] | None = None,
        onto: np.ndarray | None = None,
    ) -> None:
        """Blends `color` in.

        Args:
            mask: uint8[size, size], 0 or 1.
            color: grey value or RGB.
            softness: standard deviation of the edge, in pixels of a picture of 256; 0 leaves that to `soften`.
            opacity: 1 hides what is below.
            mottle: amplitude and number of bumps across the picture of smooth variations in brightness.
            onto: float32[C, size, size] to paint on instead of the scene's image.
        """
        x, y, w, h = cv2.boundingRect(mask)
        if w == 0:
            return
        sigma = softness * self.size / 256
        pad = int(2.5 * sigma) + 1 if sigma else 0
        rows, columns = slice(max(0, y - pad), y + h + pad), slice(max(0, x - pad), x + w + pad)
        planes = list((self.image if onto is None else onto)[:, rows, columns])
        values: list = [color] * len(planes) if isinstance(color, int | float) else np.asarray(color).tolist()
        if mottle is not None:
            texture = np.float32(mottle[0]) * self.field(mottle[1])[rows, columns]
            values = [texture + np.float32(value) for value in values]
        inside = mask[rows, columns]
        if not sigma and opacity == 1:
            for plane, value in zip(planes, values, strict=True):
                np.copyto(plane, value, where=inside.view(np.bool_))
            return
        alpha = inside * np.float32(opacity)
        if sigma:
            side = 2 * round(1.7 * sigma) + 1  # a box of this side has about that standard deviation
            alpha = cv2.blur(alpha, (side, side), borderType=cv2.BORDER_REPLICATE)
        for plane, value in zip(planes, values, strict=True):
            change = value - plane
            change *= alpha
            plane += change

    def soften(self) -> None:
        """Applies the detector's point spread, which softens every edge painted so far."""
        sigma = 0.7 * self.size / 256
        for plane in self.image:
            cv2.GaussianBlur(plane, (2 * int(2 * sigma) + 1,) * 2, sigma, dst=plane)

    def add(self, label: str, mask: np.ndarray, parent: str | None = None) -> bool:
        """Records a region under its taxonomy entry; returns False where too little of it is in the picture.

        Args:
            label: id in the taxonomy, which gives phrase, granularity and parent.
            mask: uint8[size, size], 0 or 1.
            parent: the structure that holds it here, where that is narrower than the taxonomy's.
        """
        bounds = _bounds(mask)
        if bounds is None:
            return False
        x, y, w, h = bounds
        entry = load_taxonomy().labels[label]
        if entry.granularity == "lesion":
            self._lesions |= mask
        self.regions.append(
            Region(
                box=np.array([x, y, x + w, y + h], np.float32),
                phrase=entry.name,
                label=label,
                granularity=entry.granularity,
                parent=entry.parent if parent is None else parent,
                mask=dict(coco_mask.encode(np.asarray(cv2.transpose(mask).T, np.uint8))),  # it reads columns
            )
        )
        return True

    def organ(
        self,
        label: str,
        points: np.ndarray,
        color: Color,
        *,
        within: np.ndarray | None = None,
        softness: float = 0.0,
        mottle: tuple[float, int] | None = None,
    ) -> np.ndarray:
        """Fills, paints and adds; returns the mask."""
        mask = self.fill(points, within)
        self.paint(mask, color, softness=softness, mottle=mottle)
        self.add(label, mask)
        return mask

    def grow(self, mask: np.ndarray, pixels: float) -> np.ndarray:
        """Returns the mask grown, or shrunk if negative, by `pixels` of a picture of 256, a pixel at least."""
        kernel = np.ones((2 * max(1, round(abs(pixels) * self.size / 256)) + 1,) * 2, np.uint8)
        return cv2.dilate(mask, kernel) if pixels > 0 else cv2.erode(mask, kernel)

    def free(self, mask: np.ndarray) -> np.ndarray:
        """Returns the mask without the lesions added so far and a margin, so that none hides another."""
        return cv2.subtract(mask, self.grow(self._lesions, _MARGIN))

    def _site(self, mask: np.ndarray, radius: float) -> tuple[float, float] | None:
        """Returns the middle (pixels) of a random place where a blob of `radius` pixels lies in `mask`, or None."""
        x, y, w, h = cv2.boundingRect(mask)
        if w == 0:
            return None
        r = 0.8 * radius
        for u, v in self.rng.random((24, 2)).tolist():
            cx, cy = x + u * w, y + v * h
            if min(cx, cy) - r < 0 or max(cx, cy) + r >= self.size:
                continue
            around = ((0, 0), (r, 0), (-r, 0), (0, r), (0, -r))
            if all(mask[int(cy + dy), int(cx + dx)] for dx, dy in around):
                return cx, cy
        return None

    def lump(
        self, mask: np.ndarray, radius: float, *, roughness: float = 0.15, harmonics: tuple[int, int] = (2, 6)
    ) -> np.ndarray:
        """Returns uint8[size, size] of an irregular blob of `radius` scene units in `mask`, empty if none fits."""
        pixels = max(self.length(radius), _LEAST_RADIUS)
        center = self._site(mask, pixels)
        if center is not None:
            rx, ry = pixels * self.rng.uniform(0.85, 1.15, 2)
            angle = self.between(0, np.pi)
            outline = blob(self.rng, *center, rx, ry, roughness=roughness, harmonics=harmonics, angle=angle)
            lump = self.fill(outline, mask, posed=False)
            if _bounds(lump) is not None:
                return lump
        return np.zeros_like(mask)

    def grain(self, blur: float = 0.0) -> np.ndarray:
        """Returns float32[size, size] of Gaussian noise, variance 1, correlated over `blur` of 256 pixels."""
        tile = noise_tile(self.size + _TILE_MARGIN, round(blur * self.size / 256, 2))
        x, y, turn = self.rng.integers(0, (_TILE_MARGIN, _TILE_MARGIN, 4)).tolist()
        crop = tile[y : y + self.size, x : x + self.size]
        return crop[:: 1 if turn & 1 else -1, :: 1 if turn & 2 else -1]

    def field(self, bumps: int) -> np.ndarray:
        """Returns float32[size, size] of smooth variations, variance 1, with about `bumps` across the picture."""
        return self.grain(128 / bumps)

    def texture(self, mask: np.ndarray, amplitude: float, blur: float) -> None:
        """Adds correlated noise inside `mask`."""
        x, y, w, h = cv2.boundingRect(mask)
        rows, columns = slice(y, y + h), slice(x, x + w)
        self.image[:, rows, columns] += self.grain(blur)[rows, columns] * (mask[rows, columns] * np.float32(amplitude))

    def shade(self, center: float, falloff: float) -> None:
        """Multiplies by `center` in the middle, `falloff` less at a distance of 1: the vignette of lamp and lens."""
        square = np.linspace(-1, 1, self.size, dtype=np.float32) ** 2
        self.image *= np.float32(center) - np.float32(falloff) * (square + square[:, None])

    def draw_lesions(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Chooses the lesions of this picture: none in half of all pictures, else one or two."""
        if self.chance(0.5):
            return ()
        count = 1 + int(self.chance(0.35))
        return tuple(labels[int(i)] for i in self.rng.permutation(len(labels))[:count])
