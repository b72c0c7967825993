"""Verifies records: every shard has the bytes that it had when it was built.

medglip data verify RECORDS
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track

from data_pipelines.records import RecordsError, find_shards, read_metadata
from data_pipelines.shards import hash_file


def verify(directory: str | os.PathLike, progress: bool = False) -> int:
    """Reads every shard and compares its SHA-256 with the one in the metadata.

    Returns:
        The number of shards.

    Raises:
        RecordsError: a shard is missing, of another size or of other content; all of them are named. Or the records
            were built before checksums were kept.
    """
    expected: dict[str, str] = {}
    for split in read_metadata(directory)["splits"]:
        records = find_shards(f"{os.fspath(directory)}:{split}")
        if "shard_sha256" not in records.metadata:
            raise RecordsError(f"{directory}: has no checksums; it was built by an older version, build it again")
        expected.update(zip(records.shards, records.metadata["shard_sha256"], strict=True))
    shards = track(expected, "Verifying", console=Console(stderr=True), disable=not progress)
    damaged = [shard for shard in shards if hash_file(shard) != expected[shard]]
    if damaged:
        raise RecordsError(
            f"{len(damaged)} of {len(expected)} shards changed after they were built; copy or build them again: "
            + ", ".join(damaged)
        )
    return len(expected)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="medglip data verify", description="Compares shards with their checksums.")
    parser.add_argument("records", help="folder that `medglip data build` wrote")
    options = parser.parse_args(arguments)
    try:
        count = verify(options.records, progress=True)
    except RecordsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.records}: {count} shards are as they were built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
