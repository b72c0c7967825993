"""Random access to the examples of one or several splits of records, without what batches do not hold."""

import numpy as np

from data_pipelines.records import Records, RecordsError, open_source, parse_example
from data_pipelines.schema import GroundingExample
from data_pipelines.transforms import decode_image


class ExampleSource:
    """Random access to the examples of splits, one split after another; picklable.

    Its errors name the shard and the place of the record.
    """

    def __init__(self, *records: Records, masks: bool = False):
        """Opens the shards; examples have their masks if `masks` says so.

        Raises:
            RecordsError: a split is empty, or a shard is damaged.
        """
        for split in records:
            if not split.num_examples:
                raise RecordsError(f"{split.directory}:{split.split} holds no examples")
        self.records, self._masks = records, masks
        self._sources = [open_source(split) for split in records]
        self._ends = np.cumsum([split.num_examples for split in records])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def split(self, index: int) -> tuple[int, int]:
        """Returns which of the splits holds an example, and its place there."""
        number = int(self._ends.searchsorted(index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> GroundingExample:
        number, place = self.split(index)
        record = self._sources[number][place]
        try:
            return parse_example(record, masks=self._masks)
        except RecordsError as error:
            raise RecordsError(f"{self.records[number].locate(place)}: {error}") from error

    def name(self, index: int, example: GroundingExample) -> str:
        """Names an example for error messages: its shard, its place there and its image."""
        number, place = self.split(index)
        return f"{self.records[number].locate(place)}, image {example.image_id!r}"

    def __repr__(self) -> str:
        return f"ExampleSource({', '.join(f'{x.directory}:{x.split}' for x in self.records)}, {len(self)} examples)"


def decode_example(example: GroundingExample) -> np.ndarray:
    """Returns uint8[H, W, 3], RGB.

    Raises:
        ValueError: the image cannot be decoded, or has another size than its record says.
    """
    image = decode_image(example.image)
    if image.shape[:2] != (example.height, example.width):
        raise ValueError(
            f"the image is {image.shape[1]} x {image.shape[0]} pixels and its record says "
            f"{example.width} x {example.height}: its boxes belong to another version of it; build the records again"
        )
    return image
