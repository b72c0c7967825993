"""What a compiled program does on each device: FLOPs, bytes of memory traffic, collectives, and how often loops run.

XLA's own analysis counts the body of a loop once. Here everything is counted as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from medglip_jax.planning.hlo import Array, Computation, Instruction, Program, device_groups, trip_count

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_MOVES_NOTHING = {  # names for what is there already, or counted where it starts
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
    "optimization-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update",
    "send-done", "recv-done",
}  # fmt: skip
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
_READS_PART = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: of `COLLECTIVES`.
        network: "ici", between the devices of a slice, or "dcn", between slices. The compiler for TPUs makes a
            collective over several slices of one inside each slice and one between them.
        bytes: of a device's share, each time: of what is reduced (all-reduce, reduce-scatter), of the whole result
            (all-gather), or of what is sent (the others).
        members: devices, or slices, that take part together.
        op_name: where it comes from.
    """

    kind: str
    network: str
    bytes: int
    members: int
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by ring algorithms."""
        if self.kind == "collective-permute":
            return self.bytes * (self.members > 1)
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.members - 1) / self.members


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
        op_name: where it comes from.
        trips: how often its body runs each time; None if unknown, counted as once.
        cycles: of all these runs; see `Cost`.
    """

    op_name: str
    trips: int | None
    cycles: float = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What running something once costs a device.

    Attributes:
        flops: of matrix products and convolutions, 2 for a multiplication with its addition.
        bytes: read from and written to the main memory.
        cycles: what the compiler for TPUs expects each kernel to take, as it notes beside it (`estimated_cycles`).
        collectives, loops: each with how often it runs.
        places: where its kernels come from (`op_name`), each with its bytes and cycles.
    """

    flops: float = 0
    bytes: float = 0
    cycles: float = 0
    collectives: tuple[tuple[Collective, int], ...] = ()
    loops: tuple[tuple[Loop, int], ...] = ()
    places: tuple[tuple[str, float, float], ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            self.collectives + other.collectives,
            self.loops + other.loops,
            self.places + other.places,
        )

    def times(self, count: int) -> "Cost":
        """Returns the cost of running it several times."""
        return Cost(
            self.flops * count,
            self.bytes * count,
            self.cycles * count,
            tuple((collective, runs * count) for collective, runs in self.collectives),
            tuple((loop, runs * count) for loop, runs in self.loops),
            tuple((place, size * count, cycles * count) for place, size, cycles in self.places),
        )

    @property
    def iterations(self) -> int:
        """Runs of all loop bodies, one after another."""
        return sum((loop.trips or 1) * runs for loop, runs in self.loops)

    def by_module(self) -> dict[str, tuple[float, float]]:
        """Returns bytes and cycles of each module, the largest bytes first; the blocks of a stack are one module.

        A module is the path of a kernel without the function that is jitted and without the operation itself;
        "transpose(jvp(...))" in it is the backward pass. What the compiler adds has the name "".
        """
        found: dict[str, tuple[float, float]] = {}
        for place, size, cycles in self.places:
            name = re.sub(r"\d+", "*", place.removeprefix("jit(train_step)/").rpartition("/")[0])
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + size, before[1] + cycles)
        return dict(sorted(found.items(), key=lambda x: -x[1][0]))

    def bytes_by_kind(self) -> dict[str, int]:
        """Returns the bytes of each kind of collective, the largest first; those between slices end in " (dcn)"."""
        kinds: dict[str, int] = {}
        for collective, runs in self.collectives:
            name = collective.kind if collective.network == "ici" else f"{collective.kind} ({collective.network})"
            kinds[name] = kinds.get(name, 0) + collective.bytes * runs
        return dict(sorted(kinds.items(), key=lambda x: -x[1]))

    def sent(self, network: str) -> float:
        """Returns the bytes that a device sends over a network, "ici" or "dcn"."""
        return sum(x.sent * runs for x, runs in self.collectives if x.network == network)


def dot_flops(instruction: Instruction, left: Array) -> int:
    """Returns the FLOPs of a `dot` whose left operand has that shape."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [int(x) for x in found.group(1).split(",") if x] if found else []
    return 2 * instruction.arrays[0].size * math.prod(left.dims[x] for x in contracted)


def _window(instruction: Instruction, dims: int) -> list[dict[str, tuple[int, int]]]:
    """Returns for each spatial dimension of a convolution what `window=` says, with the defaults of what it omits."""
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(x.split("=") for x in found.group(1).split()) if found else {}
    rows: list[dict[str, tuple[int, int]]] = []
    for place in range(dims):
        row = {}
        for key, default in (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")):
            text = fields[key].split("x")[place] if key in fields else default
            low, _, high = text.partition("_")
            row[key] = (int(low), int(high or low))
        rows.append(row)
    return rows


def convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """Returns the FLOPs of a `convolution`: products with padding and with the holes of dilations do not count.

    TPUs compute batched matrix products as convolutions that are mostly holes.

    Args:
        instruction: reads `window`, `dim_labels`, `feature_group_count` and `batch_group_count`.
        left, right: shapes of the input and the kernel.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"the convolution {instruction.name} has no dim_labels")
    inputs, kernels, outputs = labels.groups()
    groups = {
        key: int(found.group(1)) if (found := re.search(rf"{key}=(\d+)", instruction.attributes)) else 1
        for key in ("feature_group_count", "batch_group_count")
    }
    spatial = [x for x in inputs if x.isdigit()]
    flops = 2 * left.dims[inputs.index("f")] // groups["feature_group_count"]
    flops *= instruction.arrays[0].dims[outputs.index("f")]
    flops *= left.dims[inputs.index("b")] // groups["batch_group_count"]
    for label, row in zip(sorted(spatial), _window(instruction, len(spatial)), strict=True):
        size, stride, (low, _) = row["size"][0], row["stride"][0], row["pad"]
        spread, reach = row["lhs_dilate"][0], row["rhs_dilate"][0]
        length = left.dims[inputs.index(label)]
        positions = instruction.arrays[0].dims[outputs.index(label)]
        assert right.dims[kernels.index(label)] == size
        valid = 0
        for tap in range(size):
            # Input positions that the tap reads, in the dilated input: every `stride`-th from the first.
            first = tap * reach - low
            valid += sum(
                1
                for place in range(first, first + positions * stride, stride)
                if place >= 0 and place % spread == 0 and place // spread < length
            )
        flops *= valid
    return flops


def _main_memory(arrays: Sequence[Array]) -> int:
    return sum(x.bytes for x in arrays if x.memory == 0)


def _slices_together(target: str) -> int:
    """Returns how many slices take part in a transfer: "{1,2}x{0:3}", "{{100000,200000},...}" or pairs "a->b"."""
    first = re.search(r"\{([^{}]*)\}", target)
    if not first:
        raise ValueError(f"cannot read the slices {target[:200]!r} of the compiled program")
    if "->" in target:
        return 2
    count = 0
    for part in first.group(1).split(","):
        low, _, high = part.partition(":")
        count += int(high or low) - int(low) + 1
    return count


def collective_of(computation: Computation, instruction: Instruction, num_devices: int) -> Collective | None:
    """Returns the collective that an instruction is or starts, or None."""
    sent = sum(x.bytes for name in instruction.operands for x in computation.instructions[name].arrays)
    if instruction.opcode == "send" and "megascale" in instruction.attributes:
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        target = re.search(r'_xla_megascale_target="?([^"]*?)"?,_xla', instruction.attributes)
        kind = transfer.group(1) if transfer else ""
        if kind not in _TRANSFERS or not target:
            raise ValueError(f"cannot read the transfer between slices {instruction.name}, of type {kind!r}")
        members = _slices_together(target.group(1))
        whole = sent * members if kind == "ALL_GATHER" else sent
        return Collective(_TRANSFERS[kind], "dcn", whole, members, instruction.op_name)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    groups = device_groups(instruction, num_devices)
    if kind == "collective-permute":
        members = 2 if any(source != target for source, target in groups) else 1
    else:
        members = max(map(len, groups))
    return Collective(kind, "ici", sent * members if kind == "all-gather" else sent, members, instruction.op_name)


class CostModel:
    """Counts over the call graph of a program; each computation is counted once and multiplied."""

    def __init__(self, program: Program, num_devices: int = 1):
        """Prepares to count.

        Args:
            program: from `hlo.parse`.
            num_devices: over which it is partitioned.
        """
        self._program, self._num_devices = program, num_devices
        self._done: dict[str, Cost] = {}

    def total(self) -> Cost:
        """Returns the cost of the program."""
        return self.of(self._program.entry)

    def of(self, name: str) -> Cost:
        """Returns the cost of a computation that is no fusion's: its instructions read and write memory."""
        if name not in self._done:
            computation = self._program.computations[name]
            parts = [self._cost(computation, x) for x in computation.instructions.values()]
            self._done[name] = Cost(
                sum(x.flops for x in parts),
                sum(x.bytes for x in parts),
                sum(x.cycles for x in parts),
                tuple(y for x in parts for y in x.collectives),
                tuple(y for x in parts for y in x.loops),
                tuple(y for x in parts for y in x.places),
            )
        return self._done[name]

    def _cost(self, computation: Computation, instruction: Instruction) -> Cost:
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(self._program, computation, instruction)
            once = self.of(instruction.called("condition") or "") + self.of(instruction.called("body") or "")
            runs = 1 if trips is None else trips
            return once.times(runs) + Cost(loops=((Loop(instruction.op_name, trips, once.cycles * runs), 1),))
        if opcode == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            branches = [x.strip().removeprefix("%") for x in names.group(1).split(",")] if names else []
            branches += [x for key in ("true_computation", "false_computation") if (x := instruction.called(key))]
            return max((self.of(x) for x in branches), key=lambda cost: (cost.flops, cost.bytes), default=Cost())
        if opcode in ("call", "async-start"):
            return self.of(instruction.called("calls|to_apply") or "")
        inside = self._inside(computation, instruction)
        noted = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        cycles = int(noted.group(1)) if noted else 0
        size = self._traffic(computation, instruction)
        places = ((instruction.op_name, float(size), float(cycles)),) if size or cycles else ()
        return inside + Cost(bytes=size, cycles=cycles, places=places)

    def _inside(self, computation: Computation, instruction: Instruction) -> Cost:
        """Returns FLOPs and collectives of an instruction and, if it is a fusion, of those in it."""
        opcode = instruction.opcode
        if opcode == "fusion":
            inner = self._program.computations[instruction.called("calls") or ""]
            key = f"fusion {inner.name}"
            if key not in self._done:
                parts = [self._inside(inner, x) for x in inner.instructions.values()]
                self._done[key] = sum(parts, Cost())
            return self._done[key]
        if opcode in ("dot", "convolution"):
            shapes = [computation.instructions[x].arrays[0] for x in instruction.operands]
            if opcode == "dot":
                return Cost(flops=dot_flops(instruction, shapes[0]))
            return Cost(flops=convolution_flops(instruction, *shapes[:2]))
        collective = collective_of(computation, instruction, self._num_devices)
        users = computation.users[instruction.name]
        if collective and collective.kind == "all-reduce" and all(x.opcode == "dynamic-slice" for x in users) and users:
            collective = dataclasses.replace(collective, kind="reduce-scatter")  # each device keeps its part only
        return Cost(collectives=((collective, 1),)) if collective else Cost()

    def _traffic(self, computation: Computation, instruction: Instruction) -> int:
        """Returns the bytes that an instruction reads from and writes to the main memory."""
        opcode = instruction.opcode
        if opcode in _MOVES_NOTHING or opcode.endswith("-done"):
            return 0
        if opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CALLS):
            return 0
        operands = [computation.instructions[x] for x in instruction.operands]
        if opcode == "fusion":
            inner = self._program.computations[instruction.called("calls") or ""]
            read = sum(
                min(self._read(inner, parameter), sum(x.bytes for x in operand.arrays))
                for parameter, operand in zip(inner.parameters, operands, strict=True)
                if _main_memory(operand.arrays)
            )
            return read + self._written(inner, instruction.arrays)
        if opcode == "send":
            return _main_memory(operands[0].arrays)
        if opcode == "recv":
            return _main_memory(instruction.arrays[:1])
        if opcode == "copy-start":  # the result names source and target
            return _main_memory(instruction.arrays[:2])
        if opcode == "slice-start":
            target = instruction.arrays[len(operands[0].arrays) : len(operands[0].arrays) + 1]
            from_memory = sum(x.bytes for x in target) if _main_memory(operands[0].arrays) else 0
            return from_memory + _main_memory(target)
        if opcode in _READS_PART:
            part = sum(x.bytes for x in instruction.arrays) if _main_memory(operands[0].arrays) else 0
            return part + sum(_main_memory(x.arrays) for x in operands[1:]) + _main_memory(instruction.arrays)
        if opcode == "dynamic-update-slice":  # in place: the update is read, and written where it belongs
            update = sum(x.bytes for x in operands[1].arrays)
            return _main_memory(operands[1].arrays) + (update if _main_memory(instruction.arrays) else 0)
        if opcode == "scatter":  # in place: index, update, and both ways of what is updated
            moved = sum(_main_memory(x.arrays) for x in operands[len(instruction.arrays) :])
            updates = sum(x.bytes for operand in operands[1 + len(instruction.arrays) :] for x in operand.arrays)
            return moved + (2 * updates if _main_memory(instruction.arrays) else 0)
        if opcode.endswith("-start") and opcode.removesuffix("-start") in COLLECTIVES:
            # The result holds the operands again, before what comes; a reduction's is in their place.
            sent = sum(_main_memory(x.arrays) for x in operands)
            count = sum(len(x.arrays) for x in operands)
            return sent + (_main_memory(instruction.arrays[count : 2 * count]) or sent)
        return sum(_main_memory(x.arrays) for x in operands) + _main_memory(instruction.arrays)

    def _read(self, inner: Computation, source: Instruction) -> int:
        """Returns the bytes of an operand that a fusion reads: only parts, if all that uses it takes parts."""
        total = 0
        for user in inner.users[source.name]:
            first = user.operands[0] == source.name
            if user.opcode in _READS_PART and first and source.name not in user.operands[1:]:
                total += sum(x.bytes for x in user.arrays)
            elif user.opcode == "dynamic-update-slice" and first:
                continue  # updated in place
            elif user.opcode == "bitcast":
                total += self._read(inner, user)
            elif user.opcode == "fusion":
                nested = self._program.computations[user.called("calls") or ""]
                for parameter, name in zip(nested.parameters, user.operands, strict=True):
                    total += self._read(nested, parameter) if name == source.name else 0
            else:
                return sum(x.bytes for x in source.arrays)
        return total

    def _written(self, inner: Computation, arrays: Sequence[Array]) -> int:
        """Returns the bytes that a fusion writes: of an update in place, the update."""
        root = inner.instructions[inner.root]
        results = [inner.instructions[x] for x in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(arrays):
            return _main_memory(arrays)
        total = 0
        for result, array in zip(results, arrays, strict=True):
            while result.opcode == "bitcast":
                result = inner.instructions[result.operands[0]]
            if array.memory:
                continue
            if result.opcode == "dynamic-update-slice":
                total += sum(x.bytes for x in inner.instructions[result.operands[1]].arrays)
            else:
                total += array.bytes
        return total
