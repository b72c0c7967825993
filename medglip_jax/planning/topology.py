"""TPU topologies that are not there: libtpu compiles for them on any Linux machine."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from medglip_jax.planning.chips import CHIPS, Chip

# Without these libtpu asks Google's metadata server which machine this is, warns that it is none, and lets only one
# process load it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Bytes. With its own, libtpu 0.0.42 overflows the stack of a thread where it estimates the cost of fused convolutions
# inside a loop, as those of the tower with config.model.scan, and crashes.
_STACKS = ("fibers_default_thread_stack_size", 4 << 20)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of a pod.

    Attributes:
        chip: of which they are made.
        dims: chips of a slice along each dimension.
        slices: how many; inside is the fast network (ICI), between them the data-center network (DCN).
    """

    chip: Chip
    dims: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.dims))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"

    @property
    def num_devices(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def host(self) -> tuple[int, int, int]:
        """Chips of a host along each dimension; single chips and v5e:2x4 and the like are on one host."""
        if math.prod(self.dims) == 1:
            return (1, 1, 1)
        return (2, 4, 1) if self.chip.dimensions == 2 and self.dims == (2, 4) else self.chip.host


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads "v5e:16x16".

    Raises:
        ValueError: it is not written so, the chip is unknown, or there are no such slices of it.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found or found.group(1) not in CHIPS:
        raise ValueError(f"--topology {text}: expected one of {', '.join(CHIPS)}, a colon and a shape, as v5e:16x16")
    chip, dims = CHIPS[found.group(1)], tuple(int(x) for x in found.group(2).split("x"))
    if slices < 1:
        raise ValueError(f"--slices {slices}: at least 1")
    if len(dims) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise ValueError(f"--topology {text}: {chip.name} has {chip.dimensions} dimensions, as {chip.name}:{example}")
    topology = Topology(chip, dims, slices)
    if math.prod(dims) > chip.pod:
        raise ValueError(
            f"--topology {text}: a pod of {chip.name} has {chip.pod} chips; take several slices with --slices"
        )
    if any(size % part or not size for size, part in zip(dims, topology.host, strict=False)):
        asked = "x".join(map(str, topology.host))
        raise ValueError(f"--topology {text}: a host of {chip.name} has {asked} chips, so sizes are multiples of these")
    return topology


def devices_of(topology: Topology) -> list[Any]:
    """Returns the devices of a topology, for which programs can be compiled but not run.

    JAX is told to use the CPU for everything else, so that a TPU of this machine is left alone.

    Raises:
        ValueError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("planning needs libtpu, which compiles for TPUs on any machine: pip install -e '.[tpu]'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    arguments, (name, size) = os.environ.get("LIBTPU_INIT_ARGS", ""), _STACKS
    if name not in arguments:
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} --{name}={size}".strip()
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = dict(topology.chip.options)
    options["chips_per_host_bounds"] = list(topology.host)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.dims))}"
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu makes no topology {topology}: {str(error).splitlines()[0]}") from error
    if len(devices) != topology.num_devices:
        raise ValueError(f"libtpu takes {topology} for {len(devices)} devices; expected one a chip")
    return list(devices)
