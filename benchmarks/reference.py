"""What mmdetection's GLIP computed: a folder of keys.tsv (the checkpoint's names and shapes) and vectors.npz.

The weights are not stored: the value of each follows from its name, its shape and a seed.
"""

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

KEYS_FILE, VECTORS_FILE = "keys.tsv", "vectors.npz"

# (what the name must be like, mean, standard deviation); None stands for one over the root of the fan-in.
_RULES: tuple[tuple[Callable[[str, int], bool], float, float | None], ...] = (
    (lambda name, rank: "relative_position_bias_table" in name or ("embeddings" in name and rank == 2), 0.0, 0.5),
    (lambda name, rank: rank >= 2 and "embeddings" not in name, 0.0, None),
    (lambda name, rank: name.endswith(".scale"), 1.0, 0.1),
    (lambda name, rank: name.endswith(".bias0"), -3.0, 0.1),
    (lambda name, rank: name.rsplit(".", 1)[-1].startswith("gamma"), 0.0, 0.3),
    (lambda name, rank: name.endswith(".weight"), 1.0, 0.1),
    (lambda name, rank: True, 0.0, 0.1),
)


def reference_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns the float64 value of a parameter of the reference checkpoint."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    normal = np.asarray(rng.standard_normal(shape or None))
    mean, deviation = next((mean, std) for rule, mean, std in _RULES if rule(name, len(shape)))
    if deviation is None:
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("dot_product_projection_text.weight"):
        deviation *= 8
    return mean + deviation * normal


class ReferenceWeights(Mapping[str, np.ndarray]):
    """The reference checkpoint as a state dict; each array is made when it is asked for.

    Attributes:
        shapes: of each array, by mmdetection name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: type = np.float64):
        self.shapes, self._seed, self._dtype = dict(shapes), seed, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return reference_weight(name, self.shapes[name], self._seed).astype(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A folder of reference vectors.

    Attributes:
        shapes: of the checkpoint's arrays, by mmdetection name.
        vectors: what was computed, by the names that the folder's README lists.
        batch_size, canvas: of the images.
        num_tokens: of a prompt.
    """

    shapes: dict[str, tuple[int, ...]]
    vectors: dict[str, np.ndarray]

    @property
    def batch_size(self) -> int:
        return self.vectors["image"].shape[0]

    @property
    def canvas(self) -> tuple[int, int]:
        return self.vectors["image"].shape[2:]

    @property
    def num_tokens(self) -> int:
        return self.vectors["input_ids"].shape[1]


def load_reference(directory: str | pathlib.Path) -> Reference:
    """Reads a folder of reference vectors.

    Raises:
        ValueError: a file of it is missing or damaged.
    """
    folder = pathlib.Path(directory)
    for file in (KEYS_FILE, VECTORS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}: expected a folder of reference vectors")
    shapes = {}
    for line in (folder / KEYS_FILE).read_text(encoding="utf-8").splitlines():
        name, _, sizes = line.partition("\t")
        shapes[name] = tuple(int(size) for size in sizes.split(",") if size)
    with np.load(folder / VECTORS_FILE, allow_pickle=False) as stored:
        return Reference(shapes, dict(stored))
