"""Measures the training loader against bare decoding and against torch's DataLoader, on 512-pixel JPEGs; prints JSON.

python benchmarks/loader.py [--count 600] [--batches 20] [--repeats 3] [--output FILE]

All do the same images in the same run, in turns, and the best of the repeats counts. `bare` decodes and resizes with
OpenCV and does nothing else; `loader` and `torch` make finished training batches of the same records with the same
transform: reading, decoding, resizing, mirroring, prompt, padding, stacking. `per_core` is images a second of CPU time,
of the process and its workers.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

from benchmarks.machine import cpu_name
from configs.medglip_t import get_config
from data_pipelines.loader import TrainBatches, train_loader
from data_pipelines.records import find_shards, open_source, parse_example, write_records
from data_pipelines.schema import GroundingExample
from data_pipelines.sources.phantoms import phantom

SIZE = 512  # pixels, sides of images and canvas
DRAWN = 48  # different phantoms; the noise differs in every image
NOISE = 9.0  # standard deviation of grey values: makes JPEGs of 60 to 90 kB, as photographs have
QUALITY = 88  # of the JPEGs
BATCH = 16  # images

Work = Callable[[], Iterator[int]]  # yields images as they are done


def make_examples(count: int) -> Iterator[GroundingExample]:
    """Yields phantoms as noisy colour JPEGs, with their regions and masks."""
    import dataclasses

    rng = np.random.default_rng(0)
    drawn = [phantom(index, size=SIZE) for index in range(min(count, DRAWN))]
    noise = [rng.normal(0, NOISE, (SIZE, SIZE, 3)).astype(np.int16) for _ in range(8)]
    for index in range(count):
        example = drawn[index % len(drawn)]
        pixels = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        pixels = np.clip(pixels + np.roll(noise[index % len(noise)], index, axis=0), 0, 255).astype(np.uint8)
        encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        yield dataclasses.replace(example, image=encoded, image_id=f"{index}")


def bare(images: list[bytes], sizes: list[int], threads: int) -> Iterator[int]:
    def work(index: int) -> int:
        pixels = cv2.imdecode(np.frombuffer(images[index % len(images)], np.uint8), cv2.IMREAD_COLOR_RGB)
        assert pixels is not None
        size = sizes[index % len(sizes)]
        cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        return 1

    if threads == 1:
        yield from map(work, itertools.count())
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(work, index) for index in range(4 * threads)]
        for index in itertools.count(len(waiting)):
            yield waiting.pop(0).result()
            waiting.append(pool.submit(work, index))


def ours(data: Any, threads: int) -> Iterator[int]:
    loader = open_loader(data, threads)
    try:
        for batch in loader:
            yield len(batch["image"])
    finally:
        loader.close()


def open_loader(data: Any, threads: int) -> TrainBatches:
    changed = data.copy_and_resolve_references()
    changed.num_threads = threads
    return train_loader(changed, seed=0, batch_size=BATCH, process_index=0, process_count=1)


class Rows:
    """The rows of our loader as torch's DataLoader wants them."""

    def __init__(self, data: Any, length: int):
        self.rows, self.length = open_loader(data, 1).rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        assert row is not None
        return row


def torch_loader(data: Any, workers: int, count: int) -> Iterator[int]:
    import torch

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Rows(data, count),  # pyright: ignore[reportArgumentType] - a map-style data set needs no base class
        batch_size=BATCH,
        num_workers=workers,
        drop_last=True,
        worker_init_fn=start_worker,
    )
    for batch in loader:
        yield len(batch["image"])


def start_worker(index: int) -> None:
    cv2.setNumThreads(0)


def measure(work: Work, images: int, warm_up: int) -> tuple[float, float]:
    """Returns images a second, and images a second of CPU time."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    stream = work()
    cpu_start, total = cpu(), 0
    while total < warm_up:
        total += next(stream)
    start, done = time.perf_counter(), 0
    while done < images:
        done += next(stream)
    seconds = time.perf_counter() - start
    close = getattr(stream, "close", None)
    if close:
        close()  # workers count as children once they have ended
    return done / seconds, (total + done) / (cpu() - cpu_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600, help="images in the records")
    parser.add_argument("--batches", type=int, default=20, help=f"of {BATCH} images, in each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts, since others use the machine too")
    parser.add_argument("--output", help="write the JSON there too")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    data = get_config().data
    data.canvas, data.max_boxes, data.prefetch = (SIZE, SIZE), 64, BATCH
    images = arguments.batches * BATCH
    with tempfile.TemporaryDirectory() as folder:
        write_records(make_examples(arguments.count), folder, name="jpegs")
        source = open_source(find_shards(folder))
        encoded = [parse_example(source[index]).image for index in range(len(source))]
        low, high = data.scale_range
        sizes = np.random.default_rng(0).uniform(low * SIZE, high * SIZE, 97).round().astype(int).tolist()
        data.train = folder
        works: dict[str, Work] = {
            "bare, 1 thread": lambda: bare(encoded, sizes, 1),
            "loader, 1 thread": lambda: ours(data, 1),
            "torch, 0 workers": lambda: torch_loader(data, 0, 2 * images + 2 * BATCH),
            "bare, 2 threads": lambda: bare(encoded, sizes, 2),
            "loader, 2 threads": lambda: ours(data, 2),
            "torch, 2 workers": lambda: torch_loader(data, 2, 2 * images + 2 * BATCH),
        }
        best: dict[str, list[float]] = {name: [0.0, 0.0] for name in works}
        for _ in range(arguments.repeats):
            for name, work in works.items():
                rates = measure(work, images, 2 * BATCH)
                best[name] = [max(pair) for pair in zip(best[name], rates, strict=True)]
    result = {
        "images_per_second": {name: round(rates[0], 1) for name, rates in best.items()},
        "per_core": {name: round(rates[1], 1) for name, rates in best.items()},
        "loader_over_bare": {
            "wall, 1 thread": round(best["loader, 1 thread"][0] / best["bare, 1 thread"][0], 3),
            "wall, 2 threads": round(best["loader, 2 threads"][0] / best["bare, 2 threads"][0], 3),
            "per core, 2 threads": round(best["loader, 2 threads"][1] / best["bare, 2 threads"][1], 3),
        },
        "image_bytes": int(np.mean([len(image) for image in encoded])),
        "batch": BATCH,
        "size": SIZE,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    for name, rates in best.items():
        print(f"{name:20}{rates[0]:9.1f} images/s{rates[1]:9.1f} per core", file=sys.stderr)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
