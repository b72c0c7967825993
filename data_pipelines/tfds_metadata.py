"""The features of a GroundingExample in TFDS terms, and the JSON files that make a folder of shards a TFDS data set.

The only module that needs the whole of tensorflow_datasets, and only when records are written. No nested ragged
sequences: TFDS cannot write those without TensorFlow, so the spans of captions and expressions are triples, and the
regions of expressions pairs, beside them.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VERSION = "1.1.0"  # 1.0.0 had no expressions


def make_features() -> Any:
    """Returns the `tfds.features.FeaturesDict` of a record; `records.encode_example` writes these names."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),  # stored encoded, uint8; grey images decode to three equal channels
            "image_id": text,
            "dataset": text,
            "patient_id": text,
            "modality": text,
            "height": np.int64,
            "width": np.int64,
            "spacing_mm": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "caption": text,
            "caption_spans": tfds.features.Sequence(tfds.features.Tensor(shape=(3,), dtype=np.int64)),
            "absent": tfds.features.Sequence(text),
            "regions": tfds.features.Sequence(
                {
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                    "phrase": text,
                    "label": text,
                    "granularity": text,
                    "parent": text,
                    "iscrowd": np.bool_,
                    "mask": text,
                }
            ),
            "expressions": tfds.features.Sequence({"text": text, "kind": text}),
            "expression_regions": tfds.features.Sequence(tfds.features.Tensor(shape=(2,), dtype=np.int64)),
            "expression_spans": tfds.features.Sequence(tfds.features.Tensor(shape=(3,), dtype=np.int64)),
        }
    )


def write_tfds_metadata(
    directory: pathlib.Path, name: str, file_format: str, splits: Mapping[str, tuple[Sequence[int], int]]
) -> None:
    """Writes features.json and dataset_info.json, each by renaming a finished file into place.

    Args:
        directory: where the shards are.
        name: of the data set.
        file_format: array_record or tfrecord.
        splits: for each split the number of examples of every shard, and the bytes of all shards together.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import dataset_info, naming
    from tensorflow_datasets.core import splits as tfds_splits

    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Images with grounded regions. Boxes are x0 y0 x1 y1 in pixels, half-open; masks are the counts of "
        "compressed COCO run-length encodings; caption_spans are (region, start, end) with half-open characters, "
        "expression_spans (expression, start, end), and expression_regions (expression, region).",
        features=make_features(),
    )
    info.set_file_format(file_format)
    entries = []
    for split, (shard_lengths, num_bytes) in splits.items():
        template = naming.ShardedFileTemplate(
            data_dir=epath.Path(directory), dataset_name=name, split=split, filetype_suffix=file_format
        )
        entries.append(tfds_splits.SplitInfo(split, list(shard_lengths), num_bytes, template))
    info.set_splits(tfds_splits.SplitDict(entries))
    staging = directory / ".metadata-tmp"
    staging.mkdir(exist_ok=True)
    info.write_to_directory(staging)
    for path in staging.iterdir():
        os.replace(path, directory / path.name)
    staging.rmdir()
