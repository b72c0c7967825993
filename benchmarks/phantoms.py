"""Measures how many phantoms one core draws in a second, encoding of image and masks included; prints JSON.

python benchmarks/phantoms.py [--count 80] [--repeats 5] [--size 256]
"""

import argparse
import json
import time

import cv2

from data_pipelines.sources.phantoms import KINDS, phantom


def measure(modality: str | None, count: int, repeats: int, size: int) -> float:
    """Returns images a second of this single thread: the best of `repeats`, after a warm-up that fills the caches."""
    for index in range(2 * len(KINDS)):
        phantom(index, size=size, modality=modality)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for index in range(count):
            phantom(index, size=size, modality=modality)
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=80, help="images of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts, since others use the machine too")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    rates = {name: round(measure(name, arguments.count, arguments.repeats, arguments.size), 1) for name in KINDS}
    mixed = round(measure(None, arguments.count, arguments.repeats, arguments.size), 1)
    print(json.dumps({"images_per_second": mixed, "by_modality": rates, "size": arguments.size, "threads": 1}))


if __name__ == "__main__":
    main()
