"""What an audit asks of an image's pixels: a digest, a perceptual hash, and whether there is writing in the picture."""

import dataclasses
import functools
import hashlib
import itertools

import cv2
import numpy as np

HASH_BITS = 64
HASH_DISTANCE = 4  # bits; re-encoding (JPEG quality 50 and up) and resizing (0.75 to 1.3) of real images change up to 4
_HASH_SIDE = 32
_THUMBNAIL = 32  # side of what `look_alike` compares
_LEAST_CORRELATION, _LARGEST_DIFFERENCE = 0.995, 20  # of thumbnails; the difference in grey values of 0 to 255
LEAST_CONTRAST = 1.0  # standard deviation below which correlation means nothing

_TEXT_SIDE = 1024  # longer images are made smaller before letters are looked for
_SMALL_SIDE = 700  # and shorter ones twice as large, so that strokes are at least two pixels wide
_STROKE = 11  # pixels: side of the square that takes away what is as thin as a letter's stroke
_CONTRASTS = (50, 110)  # grey values between stroke and surroundings; faint letters, and ones that touch when faint
_MOST_LETTERS = 4000  # candidates of an image, beyond which it is texture
_INK_SHARES = (92, 8)  # percentile of a mark's grey that is its ink: light writing, dark writing
_INK_SPREAD = 12.5  # standard deviation of the grey of one line's letters: burnt-in text is one colour
_TICK_FILL, _TICK_ASPECT = 0.68, 0.32  # least area over width times height, and largest width over height
_LINE, _LONG_LINE = 4, 5  # letters
_LEAST_SHARE = 0.06  # of the candidates that must stand in lines: texture makes a few lines by chance


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of marks that looks like writing: x0, y0, x1, y1 in pixels of the image, half-open, and their number."""

    box: tuple[float, float, float, float]
    letters: int


def digest_pixels(pixels: np.ndarray) -> int:
    """Returns the first 64 bits of the SHA-256 of the size and the pixels, whatever file format they came in."""
    sha = hashlib.sha256(str(pixels.shape).encode())
    sha.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(sha.digest()[:8], "big")


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] RGB -> uint8[H, W]."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


@functools.cache
def _low_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lowest `HASH_BITS` coefficients of a cosine transform after the mean."""
    order = sorted(np.ndindex(_HASH_SIDE, _HASH_SIDE), key=lambda place: (sum(place), place))[1 : HASH_BITS + 1]
    rows, columns = np.asarray(order).T
    return rows, columns


def hash_picture(grey: np.ndarray) -> int:
    """Returns a 64-bit DCT hash: which of the lowest frequencies of the 32 x 32 picture are above their median.

    Re-encoding and resizing change few bits (`HASH_DISTANCE`), another picture about half of them. Turned, mirrored and
    cropped copies are other pictures to it.
    """
    small = cv2.resize(grey, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = cv2.dct(small)[_low_frequencies()]
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


def shrink(grey: np.ndarray) -> np.ndarray:
    """uint8[H, W] -> uint8[32, 32], the mean of what each place covers."""
    return cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)


@functools.cache
def _blur() -> np.ndarray:
    """float32[32, 32]: the product with it blurs along one axis."""
    return cv2.GaussianBlur(np.eye(_THUMBNAIL, dtype=np.float32), (1, 0), 0, sigmaY=1.0)


def soften(small: np.ndarray) -> np.ndarray:
    """Blurs small pictures [..., 32, 32] to float32, since edges fall between other pixels when a copy is resized."""
    return _blur() @ np.asarray(small, np.float32) @ _blur().T


def make_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Returns float32[32, 32], the small, blurred grey picture that `look_alike` compares."""
    return soften(shrink(to_grey(pixels)))


def look_alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether two thumbnails show the same picture: no place differs much, and their patterns agree.

    Args:
        a, b: float32[..., 32, 32].

    Returns:
        bool[...]; where one has next to no contrast, the patterns mean nothing and the difference alone counts.
    """
    a, b = (np.asarray(each, np.float64).reshape(*np.shape(each)[:-2], -1) for each in (a, b))  # [..., 1024]
    close = np.abs(a - b).max(axis=-1) <= _LARGEST_DIFFERENCE
    spread = a.std(axis=-1), b.std(axis=-1)
    flat = np.minimum(*spread) < LEAST_CONTRAST
    shared = ((a - a.mean(axis=-1, keepdims=True)) * (b - b.mean(axis=-1, keepdims=True))).mean(axis=-1)
    return close & (flat | (shared >= _LEAST_CORRELATION * spread[0] * spread[1]))


def find_near(hashes: np.ndarray, distance: int = HASH_DISTANCE, most: int = 1_000_000) -> tuple[np.ndarray, bool]:
    """Finds the pairs of hashes that differ in at most `distance` bits.

    The bits are cut into `distance` + 2 bands, of which two hashes that near have at least two in common. For each two
    bands the hashes are sorted by their bits, and only neighbours with the same ones are compared. (One band of
    `distance` + 1 would need fewer sorts, and comparisons that grow with the square: a band of 13 bits is shared by 122
    of a million hashes, two of 11 bits by next to none.)

    Args:
        hashes: uint64[N].
        distance: bits, below 63.
        most: pairs after which the search ends.

    Returns:
        (pairs, complete): int64[M, 2] with the smaller index first, and whether the search saw all of them.
    """
    found, complete = np.zeros((0, 2), np.int64), True
    edges = np.linspace(0, HASH_BITS, distance + 3).round().astype(int).tolist()
    bands = [(2**high - 1) ^ (2**low - 1) for low, high in itertools.pairwise(edges)]
    for one, other in itertools.combinations(bands, 2):
        shared = hashes & np.uint64(one | other)
        order = np.argsort(shared, kind="stable")
        shared, ordered = shared[order], hashes[order]
        places, step, passed = np.arange(len(hashes)), 1, [found]
        while complete and len(places := places[places + step < len(hashes)]):
            places = places[shared[places] == shared[places + step]]
            near = places[np.bitwise_count(ordered[places] ^ ordered[places + step]) <= distance]
            passed.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
            step += 1
            complete = sum(map(len, passed[1:])) <= most
        found = np.unique(np.concatenate(passed), axis=0)
        complete = complete and len(found) <= most
        if not complete:
            break
    return found, complete


def find_writing(grey: np.ndarray) -> list[Line]:
    """Looks for burnt-in text: rows of small, thin, high-contrast marks of one height and one ink.

    A hint, not a reader: it finds most printed lines of five letters and more on a calm background, and few lines where
    there are none. Letters that touch, handwriting, single marks ("L") and text in a busy background escape it.

    Args:
        grey: uint8[H, W].

    Returns:
        The lines; none if the marks are more likely texture.
    """
    longer = max(grey.shape)
    scale = _TEXT_SIDE / longer if longer > _TEXT_SIDE else 2.0 if longer <= _SMALL_SIDE else 1.0
    if scale != 1:
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=interpolation)
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (_STROKE, _STROKE))
    hats = [cv2.morphologyEx(grey, operation, square) for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT)]
    best: list[Line] = []
    for contrast in _CONTRASTS:
        letters = [_find_letters(hat, contrast) for hat in hats]
        rows = [
            row
            for marks, share in zip(letters, _INK_SHARES, strict=True)
            for row in _join_rows(marks)
            if np.std(_measure_ink(grey, row, share)) <= _INK_SPREAD and not _are_ticks(row)
        ]
        standing = sum(map(len, rows))
        long = max(map(len, rows), default=0) >= _LONG_LINE or len(rows) > 1
        enough = standing >= _LEAST_SHARE * sum(map(len, letters))
        if long and enough and standing > sum(line.letters for line in best):
            best = [_outline(row, scale) for row in rows]
    return best


def _find_letters(hat: np.ndarray, contrast: int) -> np.ndarray:
    """Returns int32[N, 5] (x, y, width, height, area) of the connected marks that could be letters, left to right."""
    *_, marks, _ = cv2.connectedComponentsWithStats((hat > contrast).astype(np.uint8), connectivity=4)
    _, _, width, height, area = marks.T
    fits = (height >= 7) & (height <= 0.06 * max(hat.shape)) & (width >= 2) & (width <= 1.4 * height + 2)
    fits &= (area >= 8) & (area >= 0.15 * width * height)
    fits[0] = False  # the background
    marks = marks[fits]
    if len(marks) > _MOST_LETTERS:
        return marks[:0]
    return marks[np.argsort(marks[:, 0], kind="stable")]


def _measure_ink(grey: np.ndarray, marks: np.ndarray, share: int) -> list[float]:
    return [float(np.percentile(grey[y : y + h, x : x + w], share)) for x, y, w, h, _ in marks.tolist()]


def _join_rows(marks: np.ndarray) -> list[np.ndarray]:
    """Joins letters of about one height that stand beside one another."""
    x, y, w, h, _ = marks.T.astype(np.float64)
    left = np.ones(len(marks), bool)
    rows = []
    for first in range(len(marks)):
        if not left[first]:
            continue
        row = [first]
        left[first] = False
        last = first
        while True:
            start = x[last] + w[last]
            taller = np.maximum(h, h[last])
            fits = left & (x >= start - 1) & (x - start <= 1.2 * h[last]) & (np.minimum(h, h[last]) >= 0.65 * taller)
            fits &= np.abs(y + h / 2 - y[last] - h[last] / 2) <= 0.25 * taller
            following = np.flatnonzero(fits)
            if not len(following):
                break
            last = int(following[0])
            left[last] = False
            row.append(last)
        if len(row) >= _LINE:
            rows.append(marks[row])
    return rows


def _are_ticks(row: np.ndarray) -> bool:
    """Whether most marks are upright bars, as on the rulers of dermoscopy and ultrasound."""
    _, _, width, height, area = row.T
    return bool(np.median(area / (width * height)) >= _TICK_FILL and np.median(width / height) <= _TICK_ASPECT)


def _outline(row: np.ndarray, scale: float) -> Line:
    low, high = row[:, :2].min(axis=0), (row[:, :2] + row[:, 2:4]).max(axis=0)
    x0, y0, x1, y1 = (float(value / scale) for value in (*low, *high))
    return Line((x0, y0, x1, y1), len(row))
