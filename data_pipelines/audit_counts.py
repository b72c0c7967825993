"""What an audit counts: images, regions, labels, sizes; its memory grows with the labels, not with the images."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.audit_privacy import mask_private
from data_pipelines.schema import GroundingExample

_MOST_NAMES = 20_000  # different labels, phrases or image sizes that are counted by name
_OTHERS = "(others)"

# Upper edges of the bins; the last bin is open.
BOX_SIZES = tuple(2 ** (power / 2) for power in range(-14, 1))  # root of the box's area over that of the image's
BOX_ASPECTS = tuple(2 ** (power / 2) for power in range(-6, 7))  # width over height
BOXES_PER_IMAGE = (0, 1, 2, 4, 8, 16, 32, 64, 128)
LONGER_SIDES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # pixels


class Histogram:
    """Counts of values in bins: bin i holds what is above `edges[i - 1]` and at most `edges[i]`.

    Args:
        edges: upper edges, rising; one more bin holds what is above the last.
    """

    def __init__(self, edges: Sequence[float]):
        self.edges = tuple(edges)
        self.counts = np.zeros(len(edges) + 1, np.int64)

    def add(self, values: Sequence[float] | np.ndarray) -> None:
        """Counts values."""
        # Float32 coordinates: a box as large as its image must not fall above 1.
        places = np.searchsorted(np.asarray(self.edges) * (1 + 1e-6), np.asarray(values, np.float64))
        self.counts += np.bincount(places, minlength=len(self.counts))

    def as_dict(self) -> dict[str, Any]:
        """Returns {"edges", "counts"}; there is one count more than edges."""
        return {"edges": [round(edge, 5) for edge in self.edges], "counts": self.counts.tolist()}


class Counts:
    """Counts of all splits of a records folder."""

    def __init__(self) -> None:
        self.splits: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.images = collections.Counter()
        self.datasets: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.modalities: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.granularities: collections.Counter[str] = collections.Counter()
        self.absent: collections.Counter[str] = collections.Counter()
        self.phrases: collections.Counter[str] = collections.Counter()
        self.sizes: collections.Counter[str] = collections.Counter()
        self.labels: dict[str, dict[str, Any]] = {}
        self.histograms = {
            "box_size": Histogram(BOX_SIZES),
            "box_aspect": Histogram(BOX_ASPECTS),
            "boxes_per_image": Histogram(BOXES_PER_IMAGE),
            "longer_side": Histogram(LONGER_SIDES),
        }

    def add(self, split: str, example: GroundingExample) -> None:
        """Counts a record."""
        regions = example.regions
        amounts = {
            "images": 1,
            "regions": len(regions),
            "images_without_boxes": not regions,
            "regions_with_mask": sum(region.mask is not None for region in regions),
            "crowd_regions": sum(region.iscrowd for region in regions),
            "images_with_caption": bool(example.caption),
            "images_with_absent_labels": bool(example.absent),
        }
        for counter in (
            self.images,
            self.splits[split],
            self.datasets[mask_private(example.dataset)],
            self.modalities[example.modality],
        ):
            counter.update({name: int(amount) for name, amount in amounts.items()})
        self.granularities.update(region.granularity for region in regions)
        self.absent.update(mask_private(label) for label in example.absent)
        for region in regions:
            _count_name(self.phrases, mask_private(region.phrase))
        _count_name(self.sizes, f"{example.width} x {example.height}")
        self._add_labels(split, example)
        self._add_shapes(example)

    def _add_labels(self, split: str, example: GroundingExample) -> None:
        seen = set()
        for region in example.regions:
            name = mask_private(region.label)
            if name not in self.labels and len(self.labels) >= _MOST_NAMES:
                name = _OTHERS
            entry = self.labels.setdefault(
                name, {"granularity": region.granularity, "images": 0, "regions": collections.Counter()}
            )
            entry["images"] += name not in seen
            entry["regions"][split] += 1
            seen.add(name)

    def _add_shapes(self, example: GroundingExample) -> None:
        boxes = np.asarray([region.box for region in example.regions], np.float64).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        sides = sides[(sides > 0).all(axis=1)]
        self.histograms["box_size"].add(np.sqrt(sides.prod(axis=1) / max(example.width * example.height, 1)))
        self.histograms["box_aspect"].add(sides[:, 0] / sides[:, 1])
        self.histograms["boxes_per_image"].add([len(boxes)])
        self.histograms["longer_side"].add([max(example.width, example.height)])

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts as the report holds them."""
        labels = sorted(self.labels.items(), key=lambda item: (-item[1]["regions"].total(), item[0]))
        return {
            "counts": dict(self.images),
            "splits": {name: dict(counter) for name, counter in self.splits.items()},
            "datasets": {name: dict(counter) for name, counter in sorted(self.datasets.items())},
            "modalities": {name: dict(counter) for name, counter in sorted(self.modalities.items())},
            "granularities": dict(self.granularities.most_common()),
            "labels": {name: {**entry, "regions": dict(entry["regions"])} for name, entry in labels},
            "absent": dict(self.absent.most_common()),
            "image_sizes": dict(self.sizes.most_common(20)),
            "histograms": {name: histogram.as_dict() for name, histogram in self.histograms.items()},
        }


def _count_name(counter: collections.Counter[str], name: str) -> None:
    counter[name if name in counter or len(counter) < _MOST_NAMES else _OTHERS] += 1
