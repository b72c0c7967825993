"""Measures the build of a corpus against the decoders alone, and its memory at growing numbers of images; prints JSON.

python -m benchmarks.build [--count 1024] [--volumes 24] [--repeats 3] [--output FILE]

The inputs (`benchmarks/build_inputs.py`) are made of phantoms: `voc` and `coco` are noisy colour JPEGs of 512 to 1024
pixels with boxes, or with boxes and polygons; `masks` are grey PNGs of 512 to 1024 pixels with a PNG file for each of
5 of their masks; `nifti` are compressed volumes of 256 x 256 x 64 voxels with a label map, of which the default rule
shows some 53 slices; `mix` is a recipe of all four.

`decoders` opens, reads and decodes each file that a build must read once, in full, with the libraries that the sources
use, and does nothing else: Pillow for the JPEGs, the PNGs and their masks, nibabel for volumes and label maps. It reads
no boxes, checks nothing, encodes and writes nothing. (The build reads JPEGs to their end too, but computes only the
means of their blocks, which is faster; that counts for it.) `with encoder` adds what no build of volumes can leave out
either: making PNGs of the slices that are shown, by the encoder of the build, from slices that are cut and windowed
already. The files of the other kinds are kept as they came. `build` is the whole command `medglip data build`, from the
folder to records with checksums.

Everything is measured in the same run, in turns, and the best of the repeats counts. `per_core` is images a second of
CPU time of all processes, `wall` images a second. What starting costs is left out of both: a build of an eighth of the
images is subtracted from that of all of them, and `start_seconds` is what remains of a build without images, with one
worker. `over_decoders` is the build's images per core, or a second, over those of the decoders in as many processes.

`memory_mib` is of builds of an eighth, a half and all of the images with two workers: `all` is the sum over the
processes of what is resident, pages that they share counted in each, sampled every 20 ms; `first` the process that
decides over all images.
"""

import argparse
import concurrent.futures
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import nibabel
import numpy as np
import yaml
from PIL import Image

from benchmarks.build_inputs import DATA_SETS, link_part, list_work, make_inputs
from benchmarks.machine import cpu_name
from data_pipelines import volumes
from data_pipelines.sources import load_source

WORKERS = (1, 2)
PARTS = {"eighth": 8, "half": 2, "all": 1}  # of the images


def decode_picture(paths: Sequence[str]) -> None:
    for path in paths:
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()


def decode_volume(paths: Sequence[str]) -> None:
    for path in paths:
        np.asanyarray(nibabel.load(path).dataobj)  # pyright: ignore[reportAttributeAccessIssue]


def decode(kind: str, work: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """Returns CPU seconds, and when it began and ended."""
    cv2.setNumThreads(0)
    function = decode_volume if kind == "nifti" else decode_picture
    function(work[0])  # imports and the first allocations
    start, cpu = time.time(), time.process_time()
    for paths in work:
        function(paths)
    return time.process_time() - cpu, start, time.time()


def encode(pictures: Sequence[np.ndarray]) -> tuple[float, float, float]:
    volumes.encode_png(pictures[0])
    start, cpu = time.time(), time.process_time()
    for picture in pictures:
        volumes.encode_png(picture)
    return time.process_time() - cpu, start, time.time()


@dataclasses.dataclass
class Cost:
    """CPU seconds and seconds of something."""

    cpu: float
    wall: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.cpu - other.cpu, self.wall - other.wall)

    def least(self, other: "Cost") -> "Cost":
        return Cost(min(self.cpu, other.cpu), min(self.wall, other.wall))


def share_out(function: Callable[..., Any], leading: tuple, work: Sequence[Any], pool: Any, workers: int) -> Cost:
    """Runs a part of the work in each of so many processes."""
    futures = [pool.submit(function, *leading, work[place::workers]) for place in range(workers)]
    results = [future.result() for future in futures]
    starts, ends = ([result[place] for result in results] for place in (1, 2))
    return Cost(sum(result[0] for result in results), max(ends) - min(starts))


def write_recipe(folder: pathlib.Path, kinds: Sequence[str]) -> pathlib.Path:
    sets = {kind: {**DATA_SETS[kind], "input": kind} for kind in kinds}
    path = folder / f"{'-'.join(kinds)}.yaml"
    path.write_text(yaml.safe_dump({"name": "corpus", "data_sets": sets}))
    return path


@dataclasses.dataclass
class Build:
    """What a build took: images and bytes written, cost, and peaks of memory in MiB."""

    images: int
    bytes: int
    cost: Cost
    tree: float
    first: float

    def best(self, other: "Build") -> "Build":
        """Of two measurements of the same build: the lower cost, the higher peak."""
        tree, first = max(self.tree, other.tree), max(self.first, other.first)
        return dataclasses.replace(self, cost=self.cost.least(other.cost), tree=tree, first=first)


def build(recipe: pathlib.Path, root: pathlib.Path, workers: int, output: pathlib.Path) -> Build:
    command = [sys.executable, "-m", "data_pipelines.build", "--recipe", str(recipe), "--root", str(root)]
    command += ["--output", str(output), "--workers", str(workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = {"tree": 0.0, "first": 0.0}
    done = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peaks, done))
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    status = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if status:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # with the workers, which the command waits for
    metadata = json.loads((output / "medglip.json").read_text())
    images = sum(split["num_examples"] for split in metadata["splits"].values())
    written = sum(sum(split["shard_bytes"]) for split in metadata["splits"].values())
    shutil.rmtree(output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Build(images, written, Cost(cpu, seconds), peaks["tree"], peaks["first"])


def watch_memory(process: int, peaks: dict[str, float], done: threading.Event) -> None:
    """Keeps the peak of the resident memory of a process and of it with all that it started."""
    while not done.wait(0.02):
        tree = [process]
        for parent in tree:
            try:
                tasks = os.listdir(f"/proc/{parent}/task")
                for task in tasks:
                    with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:
                        tree += map(int, file.read().split())
            except OSError:  # it ended
                continue
        resident = [read_resident(each) for each in tree]
        peaks["first"] = max(peaks["first"], resident[0])
        peaks["tree"] = max(peaks["tree"], sum(resident))


def read_resident(process: int) -> float:
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def measure(root: pathlib.Path, counts: dict[str, int], repeats: int) -> dict[str, Any]:
    """Makes the inputs in a folder and measures; returns the result but for the machine."""
    context = multiprocessing.get_context("spawn")
    recipes = {kind: write_recipe(root, [kind]) for kind in counts} | {"mix": write_recipe(root, list(counts))}
    decoders: dict[tuple[str, int], Cost] = {}
    encoders: dict[int, Cost] = {}
    builds: dict[tuple[str, str, int], Build] = {}
    with concurrent.futures.ProcessPoolExecutor(max(WORKERS), context) as pool:
        for kind, count in counts.items():
            make_inputs(root / "all", kind, count, pool)
            for part, share in PARTS.items():
                if share > 1:
                    link_part(root / "all", root / part, kind, count // share)
        work = {kind: list_work(root / "all" / kind, kind) for kind in counts}
        slices = load_source("nifti", root / "all" / "nifti", dataset="nifti", modality="ct", options={})
        pictures = [np.asarray(Image.open(io.BytesIO(example.image))) for example in slices]
        for _ in range(repeats):
            for workers in WORKERS:
                for kind in counts:
                    cost = share_out(decode, (kind,), work[kind], pool, workers)
                    decoders[kind, workers] = cost.least(decoders.get((kind, workers), cost))
                cost = share_out(encode, (), pictures, pool, workers)
                encoders[workers] = cost.least(encoders.get(workers, cost))
                for kind, recipe in recipes.items():
                    for part in PARTS if kind == "mix" and workers == max(WORKERS) else ("eighth", "all"):
                        made = build(recipe, root / part, workers, root / "records")
                        builds[kind, part, workers] = made.best(builds.get((kind, part, workers), made))
                        print(f"{kind}, {part}, {workers} workers: {made}", file=sys.stderr)
    nothing = Cost(0.0, 0.0)
    for workers in WORKERS:
        decoders["mix", workers] = sum((decoders[kind, workers] for kind in counts), nothing)
    result: dict[str, Any] = {"per_core": {}, "wall": {}, "over_decoders": {}, "start_seconds": {}}
    for kind in recipes:
        rates, ratios = {"per_core": {}, "wall": {}}, {}
        for workers in WORKERS:
            whole, eighth = builds[kind, "all", workers], builds[kind, "eighth", workers]
            costs = {"decoders": decoders[kind, workers]}
            if kind in ("nifti", "mix"):
                costs["with encoder"] = costs["decoders"] + encoders[workers]
            for name, field in (("per_core", "cpu"), ("wall", "wall")):
                seconds = getattr(whole.cost - eighth.cost, field)
                rate = (whole.images - eighth.images) / seconds
                rates[name][f"build, {workers}"] = round(rate, 1)
                for what, cost in costs.items():
                    bare = whole.images / getattr(cost, field)
                    rates[name][f"{what}, {workers}"] = round(bare, 1)
                    label = f"{name.replace('_', ' ')}, {workers}" + (", with encoder" if what != "decoders" else "")
                    ratios[label] = round(rate / bare, 3)
            if workers == 1:
                pace = (whole.cost.wall - eighth.cost.wall) / (whole.images - eighth.images)
                result["start_seconds"][kind] = round(eighth.cost.wall - pace * eighth.images, 2)
        result |= {name: {**result[name], kind: rates[name]} for name in rates}
        result["over_decoders"][kind] = ratios
    result["memory_mib"] = [
        {"images": made.images, "all": round(made.tree), "first": round(made.first)}
        for made in (builds["mix", part, max(WORKERS)] for part in PARTS)
    ]
    result["inputs"] = {
        kind: {
            "files": sum(map(len, files)),
            "bytes": sum(os.path.getsize(path) for paths in files for path in paths),
            "images": builds[kind, "all", 1].images,
            "record_bytes": builds[kind, "all", 1].bytes,
        }
        for kind, files in work.items()
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count",
        type=int,
        default=1024,
        help="images of each kind; fewer than 1024 leave one process of two without work",
    )
    parser.add_argument("--volumes", type=int, default=24, help="of nifti")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts, since others use the machine too")
    parser.add_argument("--output", help="write the JSON there too")
    arguments = parser.parse_args()
    if min(arguments.count // 8, arguments.volumes // 8) < 1:
        parser.error("an eighth of --count and of --volumes must be 1 or more")
    counts = {kind: arguments.volumes if kind == "nifti" else arguments.count for kind in DATA_SETS}
    with tempfile.TemporaryDirectory() as folder:
        result = measure(pathlib.Path(folder), counts, arguments.repeats)
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
