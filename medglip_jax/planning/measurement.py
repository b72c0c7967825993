"""Compiling a lowered program, and what is read from the result."""

import dataclasses
import hashlib
import importlib.metadata
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from medglip_jax.planning.chips import Chip
from medglip_jax.planning.costs import Cost, CostModel, Loop
from medglip_jax.planning.hlo import parse
from medglip_jax.planning.roofline import Roofline

_TOO_LARGE = (
    re.compile(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LISTED = 4  # loops that are named
_LISTED_MODULES = 8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the compiler said of a program for each device.

    Attributes:
        arguments, temporaries, outputs, code: bytes; outputs are those that take no argument's place. Where the program
            does not fit, the compiler tells the sum only, which is in `temporaries`.
        fits: whether the compiler accepted it, and whether all of it goes into the chip's memory.
        flops, hbm_bytes, cycles, iterations: see `Cost`; 0 where it does not fit.
        collectives: bytes of each kind.
        sent_ici, sent_dcn: bytes that a device sends inside its slice and between slices.
        loops: the longest: (where, runs of the body, cycles).
        traffic: the modules with the most bytes to and from HBM: (module, bytes, cycles).
        unknown_loops: how many were counted as running once.
        compile_s: seconds that the compiler took.
    """

    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    fits: bool = False
    flops: float = 0
    hbm_bytes: float = 0
    cycles: float = 0
    iterations: int = 0
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sent_ici: float = 0
    sent_dcn: float = 0
    loops: Sequence[Sequence[Any]] = ()
    traffic: Sequence[Sequence[Any]] = ()
    unknown_loops: int = 0
    compile_s: float = 0

    @property
    def total(self) -> int:
        """Bytes of a device's memory that it takes."""
        return self.arguments + self.temporaries + self.outputs + self.code

    def to_json(self) -> dict[str, Any]:
        """Returns all of it for a JSON file; `Measurement.from_json` reads it."""
        fields = dataclasses.asdict(self)
        sizes = {name: fields.pop(name) for name in ("arguments", "temporaries", "outputs", "code")}
        return {"bytes_per_device": sizes | {"total": self.total}} | fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Measurement":
        """Reads what `to_json` returned; other fields are ignored."""
        flat = {**fields["bytes_per_device"], **fields}
        return cls(**{field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat})

    def roofline(self, chip: Chip, num_devices: int, *, images: int, model_flops_per_image: float) -> Roofline:
        """Returns the least time of a step; see `Roofline`.

        Args:
            chip: of which the devices are.
            num_devices: of the program.
            images: of a step, on all devices.
            model_flops_per_image: FLOPs that the model needs for one, whatever the program does.
        """
        return Roofline(
            compute=self.flops / chip.flops,
            memory=self.hbm_bytes / chip.hbm_bandwidth,
            ici=self.sent_ici / chip.ici_bandwidth,
            dcn=self.sent_dcn / chip.dcn,
            images=images,
            model_flops=images * model_flops_per_image,
            peak=chip.flops * num_devices,
        )


def fingerprint(lowered: Any, topology: str, effort: float) -> str:
    """Returns a name for a program with the topology and the compiler that it is for."""
    versions = f"{jax.__version__} {importlib.metadata.version('libtpu')} {topology} {effort}"
    return hashlib.sha256(f"{versions}\n{lowered.as_text()}".encode()).hexdigest()[:16]


def _longest(loops: Sequence[tuple[Loop, int]]) -> list[list[Any]]:
    merged: dict[str, list[float]] = {}
    for loop, count in loops:
        row = merged.setdefault(re.sub(r"\d+", "*", loop.op_name), [0, 0])  # the blocks of a stack are one line
        row[0] += (loop.trips or 1) * count
        row[1] += loop.cycles * count
    return [[name, *row] for name, row in sorted(merged.items(), key=lambda x: -x[1][0])[:_LISTED]]


def measure(lowered: Any, chip: Chip, num_devices: int, effort: float = 0.0) -> Measurement:
    """Compiles a program and counts what it does.

    Args:
        lowered: from `lower_train` or `lower_eval`.
        chip: of the topology.
        num_devices: of the mesh.
        effort: of the compiler, from -1 (fastest) to 0, what it does in a run.

    Raises:
        JaxRuntimeError: the compiler fails for another reason than that the program is too large.
    """
    before = jax.config.jax_exec_time_optimization_effort  # pyright: ignore[reportAttributeAccessIssue]
    started = time.perf_counter()
    try:
        jax.config.update("jax_exec_time_optimization_effort", effort)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        size = next((found for x in _TOO_LARGE if (found := x.search(str(error)))), None)
        if size is None:
            raise
        needed = int(float(size.group(1)) * _UNITS[size.group(2)])
        return Measurement(temporaries=needed, compile_s=round(time.perf_counter() - started, 1))
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    cost: Cost = CostModel(parse(compiled.as_text()), num_devices).total()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return Measurement(
        **sizes,
        fits=sum(sizes.values()) <= chip.hbm,
        flops=cost.flops,
        hbm_bytes=cost.bytes,
        cycles=cost.cycles,
        iterations=cost.iterations,
        collectives=cost.bytes_by_kind(),
        sent_ici=cost.sent("ici"),
        sent_dcn=cost.sent("dcn"),
        loops=_longest(cost.loops),
        traffic=[[name, *counts] for name, counts in cost.by_module().items()][:_LISTED_MODULES],
        unknown_loops=sum(loop.trips is None for loop, _ in cost.loops),
        compile_s=round(seconds, 1),
    )
