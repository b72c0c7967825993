"""Compiled programs as XLA prints them (HLO text): computations, instructions, how often loops run, device groups."""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of a number of types whose name does not end in its width
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%?([\w.\-]+)$")
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{$")
_MAX_TRIPS = 1 << 40

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array.

    Attributes:
        dtype: as HLO writes it ("bf16").
        dims: sizes.
        memory: XLA's memory space: 0 is the device's main memory (HBM), 1 the TPU's on-chip memory, 5 the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of its numbers, without the padding of tiled layouts."""
        width = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(width.group()) if width else 8
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as printed, without "%".
        arrays: of the result; several if that is a tuple, whose nesting is dropped.
        operands: names of instructions of the same computation.
        literal: what stands in the brackets: the value of a constant, the number of a parameter.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute ("body", "calls|to_apply") names, if it has that attribute."""
        found = re.search(rf"(?<!\w)(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, "" if the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions by name, in the order of the text, and the name of the one whose value is its result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its parameters in order."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return tuple(sorted(found, key=lambda x: int(x.literal)))

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The instructions that read each one."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return {name: tuple(found) for name, found in users.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the name of the one that runs."""

    computations: Mapping[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    """Returns where the bracket that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no closing bracket in the HLO line {text[:200]!r}")


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Reads a type, "f32[2,3]{1,0:T(8,128)S(1)}" or a tuple of them in brackets."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(x.strip("<= ")) for x in dims.split(",") if x.strip())  # <= marks a bounded dynamic size
        arrays.append(Array(dtype, sizes, int(memory.group(1)) if memory else 0))
    return tuple(arrays)


def _parse_instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = parse_arrays(rest[:end])
    opcode, _, _ = rest[end:].lstrip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    operands: list[str] = []
    if opcode not in ("constant", "parameter", "iota"):
        for part in re.sub(r"/\*.*?\*/", "", literal).split(","):
            found = _NAME.search(part.strip())
            # Types of operands, which some versions print, are cut at their commas: only the last piece is a name.
            if found and (part.strip().startswith("%") or " " in part.strip() or "[" not in part):
                operands.append(found.group(1))
    return Instruction(name.strip().removeprefix("%"), opcode, arrays, tuple(operands), literal, rest[stop + 1 :])


def parse(text: str) -> Program:
    """Reads the HLO of a program, as `compiled.as_text()` or `lowered.as_text("hlo")` return it.

    Raises:
        ValueError: the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = root = ""
    instructions: dict[str, Instruction] = {}
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith(("HloModule", "//", "#")):
            continue
        if current and line.startswith("}"):  # `}, execution_thread="sparsecore"` on chips with SparseCores
            known = {  # literals of other kinds look like names too
                name: dataclasses.replace(x, operands=tuple(y for y in x.operands if y in instructions))
                for name, x in instructions.items()
            }
            computations[current] = Computation(current, known, root or next(reversed(known)))
            current = ""
        elif current:
            instruction = _parse_instruction(line)
            instructions[instruction.name] = instruction
            if line.startswith("ROOT "):
                root = instruction.name
        elif header := _HEADER.match(line):
            current, root, instructions = header.group(2), "", {}
            entry = current if header.group(1) else entry
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Program(computations, entry)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_DIRECTIONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_TRANSPARENT = ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start", "optimization-barrier")


def _evaluate(
    program: Program, computation: Computation, name: str, arguments: Sequence[Any], carried: Mapping[int, int]
) -> int | None:
    """Returns the value of an integer scalar, or None where it depends on more than constants and what is given.

    Args:
        arguments: values of the computation's parameters, None where unknown.
        carried: known elements of the tuple that is parameter 0, by index.
    """
    instruction = computation.instructions[name]

    def value(operand: str) -> int | None:
        return _evaluate(program, computation, operand, arguments, carried)

    if instruction.opcode == "constant":
        text = instruction.literal.strip("{} ")
        return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
    if instruction.opcode == "parameter":
        number = int(instruction.literal)
        return arguments[number] if number < len(arguments) else None
    if instruction.opcode in _TRANSPARENT:
        return value(instruction.operands[0])
    if instruction.opcode == "get-tuple-element":
        source = computation.instructions[instruction.operands[0]]
        index = int(re.search(r"index=(\d+)", instruction.attributes).group(1))  # pyright: ignore
        if source.opcode == "tuple":
            return value(source.operands[index])
        return carried.get(index) if source.opcode == "parameter" else None
    if instruction.opcode in ("fusion", "call") and (called := instruction.called("calls|to_apply")):
        inner = program.computations[called]
        return _evaluate(program, inner, inner.root, [value(x) for x in instruction.operands], {})
    if instruction.opcode == "compare" or instruction.opcode in _BINARY:
        left, right = (value(x) for x in instruction.operands)
        if left is None or right is None:
            return None
        if instruction.opcode == "compare":
            direction = re.search(r"direction=(\w+)", instruction.attributes)
            return int(_DIRECTIONS[direction.group(1)](left, right)) if direction else None
        return _BINARY[instruction.opcode](left, right)
    return None


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a while loop runs, or None if the text does not say.

    It is `known_trip_count` where the compiler wrote that; the one for TPUs does not. Otherwise the loop's counters are
    followed: integer scalars that start from constants and move by the same constant in each run.
    """
    known = re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition, body = (program.computations[loop.called(x) or ""] for x in ("condition", "body"))
    start = computation.instructions[loop.operands[0]]
    result = body.instructions[body.root]
    if start.opcode != "tuple" or result.opcode != "tuple":
        return None

    first: dict[int, int] = {}
    for index, name in enumerate(start.operands):
        value = _evaluate(program, computation, name, (), {})
        if value is not None:
            first[index] = value

    def run(state: Mapping[int, int]) -> dict[int, int]:
        after = {index: _evaluate(program, body, result.operands[index], (), state) for index in state}
        return {index: value for index, value in after.items() if value is not None}

    second = run(first)
    third = run(second)
    steps = {x: second[x] - first[x] for x in third if third[x] - second[x] == second[x] - first[x]}

    def goes_on(runs: int) -> int | None:
        return _evaluate(
            program, condition, condition.root, (), {x: first[x] + runs * step for x, step in steps.items()}
        )

    if goes_on(0) is None:
        return None
    if not goes_on(0):
        return 0
    most = 1
    while goes_on(most):
        most *= 2
        if most > _MAX_TRIPS:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if goes_on(middle) else (least, middle)
    return most


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


# mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}: axes with sizes, the order of the devices, axes of a group.
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*)\))?\s*\{([^}]*)\}")


def _mesh_devices(order: str | None, count: int) -> np.ndarray:
    """Returns the devices of a mesh: in order, "[2,4]T(1,0)" transposed, or "0,2,1,3" as listed."""
    if not order:
        return np.arange(count)
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        shape = _integers(found.group(1))
        axes = _integers(found.group(2)) if found.group(2) else range(len(shape))
        return np.arange(count).reshape(shape).transpose(*axes)
    return np.array(_integers(order))


@functools.lru_cache(maxsize=4096)
def parse_groups(attributes: str, num_devices: int) -> Groups:
    """Returns which devices take part in a collective together.

    Args:
        attributes: the text of `replica_groups=` in any of its four forms, {{0,1},{2,3}}, [2,2]<=[4],
            [2,2]<=[2,2]T(1,0) or mesh['a'=2,'b'=2] {'a'}; or of `source_target_pairs=`, whose pairs are the groups.
        num_devices: of the program; what {} means.

    Raises:
        ValueError: the text is of another form.
    """
    ids = np.arange(num_devices)
    if attributes in ("", "{}"):
        return (tuple(ids.tolist()),)
    if attributes.startswith("{"):
        return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d, ]*)\}", attributes))
    if found := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = _integers(found.group(1)), _integers(found.group(2))
        order = _integers(found.group(3)) if found.group(3) else range(len(source))
        rows = np.arange(math.prod(source)).reshape(source).transpose(*order).reshape(shape)
        return tuple(map(tuple, rows.reshape(-1, shape[-1]).tolist()))
    if found := re.fullmatch(_MESH, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        parts: list[tuple[int, bool]] = []  # sizes of the pieces of the mesh, and whether a group extends over each
        named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(3))
        for axis, size in sizes.items():
            piece = next((x for x in named if x[0] == axis), None)
            if piece is None or not piece[1]:
                parts.append((size, piece is not None))
            else:
                before, inside = int(piece[1]), int(piece[2])
                parts += [(before, False), (inside, True), (size // before // inside, False)]
        grid = _mesh_devices(found.group(2), math.prod(sizes.values())).reshape([size for size, _ in parts])
        apart = [place for place, (_, together) in enumerate(parts) if not together]
        joined = [place for place, (_, together) in enumerate(parts) if together]
        members = math.prod(parts[place][0] for place in joined)
        return tuple(map(tuple, grid.transpose(*apart, *joined).reshape(-1, members).tolist()))
    raise ValueError(f"cannot read the device groups {attributes[:200]!r} of the compiled program")


def device_groups(instruction: Instruction, num_devices: int) -> Groups:
    """Returns the groups of devices of a collective; see `parse_groups`."""
    pairs = re.search(r"source_target_pairs=(\{(?:\{[^}]*\},?)*\})", instruction.attributes)
    if pairs:
        return parse_groups(pairs.group(1), num_devices)
    forms = (
        r"\{(?:\{[^}]*\},?\s*)*\}",
        r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?",
        r"mesh\[[^\]]*\][^{]*\{[^}]*\}",
    )
    found = re.search(f"replica_groups=({'|'.join(forms)})", instruction.attributes)
    if not found and "replica_groups=" in instruction.attributes:
        rest = instruction.attributes.split("replica_groups=")[1]
        raise ValueError(f"cannot read the device groups {rest[:200]!r} of the compiled program")
    return parse_groups(found.group(1) if found else "", num_devices)
