"""What a compiled program moves, read from its optimized HLO text: over the network and through memory, per device.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.

    all-gather        (n - 1) / n x result           n: devices of a group; the traffic of a ring, per device
    reduce-scatter    (n - 1) / n x operand
    all-reduce        2 (n - 1) / n x operand        a reduce-scatter, then an all-gather
    all-to-all        (n - 1) / n x operand
    permute           operand

Memory: what each instruction reads from and writes to main memory (HBM), in the padded layout that it has there;
buffers in on-chip memory are free. Of an operand that a fusion only slices, the slice counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}
_FREE = {  # move nothing, or are counted where they are computed
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "iota", "domain", "add-dependency", "async-start"),
}
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # all others have their width in their name
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type: `layout` is the text between its braces, e.g. `1,0:T(8,128)S(1)`."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @functools.cached_property
    def bytes(self) -> float:
        """What its elements take."""
        return math.prod(self.dims) * _bits(self.dtype) / 8

    @functools.cached_property
    def stored_bytes(self) -> float:
        """What it takes in main memory, padded to whole tiles; 0 if it is kept elsewhere."""
        if re.search(r"S\([1-9]", self.layout):
            return 0.0
        order, tile = re.match(r"[\d,]*", self.layout)[0], re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not order:
            return self.bytes
        dims = [self.dims[int(axis)] for axis in reversed(order.split(","))]
        sides = [int(side) for side in tile[1].split(",")][-len(dims) :]
        padded = [-(-size // side) * side for size, side in zip(dims[-len(sides) :], sides)]
        return math.prod(dims[: -len(sides)] + padded) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = types opcode(operands), attributes`."""

    name: str
    types: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Per device and run of the program.

    collectives: bytes sent, by kind.
    memory: bytes read from and written to main memory.
    unknown_loops: loops whose number of rounds depends on data; they count once.
    """

    collectives: Mapping[str, float]
    memory: float
    unknown_loops: int


def traffic(text: str) -> Traffic:
    """Reads a program: `compiled.as_text()`."""
    computations, entry = parse(text)
    devices = int(match[1]) if (match := re.search(r"num_partitions=(\d+)", text)) else 1
    sent: dict[str, dict[str, float]] = {}
    memory, unknown = 0.0, 0
    for computation, times, fused in _runs(computations, entry):
        for instruction in computation.values():
            if kind := _collective(instruction.opcode):
                where = re.search(r"channel_id=(\d+)", instruction.attributes)
                parts = sent.setdefault(kind if fused != "scatter" else "reduce-scatter", {})
                key = where[1] if where else instruction.name  # an asynchronous one is written several times
                parts[key] = max(parts.get(key, 0.0), times * _sent(instruction, computation, kind, devices, fused))
            if not fused:
                memory += times * _moved(instruction, computation, computations)
            unknown += instruction.opcode == "while" and _rounds(instruction, computations) is None
    return Traffic({kind: sum(parts.values()) for kind, parts in sent.items()}, memory, unknown)


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that the program starts with.

    Raises:
      ValueError: a computation without an end, so the text has something in it that is not understood here.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):  # a kernel's attributes have lines with "}" too
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if ends := [name for name, each in computations.items() if not any(line.root for line in each.values())]:
        raise ValueError(f"cannot read the program: {ends[0]} has no root")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        head[2], arrays(types), rest[:opening], operands, arguments, rest[closing + 1 :], head[1] is not None
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def arrays(types: str) -> tuple[Array, ...]:
    """The array types in a piece of text, in order."""
    return tuple(
        Array(dtype, tuple(int(side) for side in dims.split(",") if side), (layout or "{}")[1:-1])
        for dtype, dims, layout in _SHAPE.findall(types)
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])


# --- how often -------------------------------------------------------------------------------------------------------


def _runs(computations: dict[str, Computation], entry: str) -> Iterator[tuple[Computation, float, str]]:
    """(computation, how often it runs, "" or where it is fused into)."""
    waiting = [(entry, 1.0, "")]
    while waiting:
        name, times, fused = waiting.pop()
        yield computations[name], times, fused
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                rounds = times * (_rounds(instruction, computations) or 1)
                waiting.append((instruction.called("body"), rounds, fused))
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names += [
                    found for key in ("true_computation", "false_computation") if (found := instruction.called(key))
                ]
                waiting += [(branch, times / len(names), fused) for branch in names]  # each as likely
            elif instruction.opcode == "fusion":
                scatter = "all-reduce-scatter" in instruction.called("calls")
                waiting.append((instruction.called("calls"), times, "scatter" if scatter else "fusion"))
            elif instruction.opcode == "call":
                waiting.append((instruction.called("to_apply"), times, fused))
            elif instruction.opcode == "async-start":
                waiting.append((instruction.called("calls"), times, fused))


def _rounds(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: what XLA noted, or the bound that a counter from zero is compared with."""
    if noted := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = computations[loop.called("condition")]
    root = next(each for each in condition.values() if each.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    bounds = [bound for name in root.operands if (bound := _number(condition, name)) is not None]
    counters = [condition[name] for name in root.operands if name in condition and _number(condition, name) is None]
    return -(-bounds[0] // _step(counters, computations[loop.called("body")])) if len(bounds) == 1 else None


def _step(counters: list[Instruction], body: Computation) -> int:
    """What the body adds to a loop's counter: 2 where XLA has unrolled a matrix product that gathers as it goes."""
    place = re.search(r"index=(\d+)", counters[0].attributes) if counters else None
    results = next((each.operands for each in body.values() if each.root and each.opcode == "tuple"), ())
    added = body.get(results[int(place[1])]) if place and int(place[1]) < len(results) else None
    while added and added.opcode == "copy":
        added = body.get(added.operands[0])
    steps = [_number(body, name) for name in added.operands] if added and added.opcode == "add" else []
    return next((step for step in steps if step), 1)


def _number(computation: Computation, name: str) -> int | None:
    """The value of a whole, positive constant; None for anything else."""
    found = computation.get(name)
    constant = found is not None and found.opcode == "constant" and found.arguments.isdigit()
    return int(found.arguments) if constant else None


# --- how much --------------------------------------------------------------------------------------------------------


def _collective(opcode: str) -> str | None:
    return COLLECTIVES.get(opcode.removesuffix("-start"))


def _sent(instruction: Instruction, computation: Computation, kind: str, devices: int, fused: str) -> float:
    given = sum(
        array.bytes for name in instruction.operands if name in computation for array in computation[name].types
    )
    if kind == "permute":
        return given
    size = _group(instruction.attributes, devices)
    share = (size - 1) / size
    if kind == "all-gather":
        return share * given * size
    return (2 if kind == "all-reduce" and fused != "scatter" else 1) * share * given


def _group(attributes: str, devices: int) -> int:
    """Devices of a group, in any of the ways in which XLA writes groups; all of them if it names none.

    Raises:
      ValueError: it names groups in another way.
    """
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"unknown way to write groups of devices: {attributes[:200]}")
    return devices


def _moved(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    written = sum(array.stored_bytes for array in instruction.types)
    read = [
        sum(a.stored_bytes for a in computation[n].types) if n in computation else 0.0 for n in instruction.operands
    ]
    if opcode in ("slice-start", "dynamic-slice-start"):  # its type: operands, the slice, flags
        piece = instruction.types[len(instruction.operands)]
        return piece.bytes + piece.stored_bytes
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # its type: operands, results, flags
        return written
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(read[1:2])
    if opcode == "fusion":
        body = computations[instruction.called("calls")]
        return _fusion(body, read, written)
    return written + sum(read)


def _fusion(body: Computation, read: list[float], written: float) -> float:
    """A fusion reads of each operand what its body slices, and writes of a buffer that it updates the update."""
    users: dict[str, list[Instruction]] = {}
    for instruction in body.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = written
    for parameter in (each for each in body.values() if each.opcode == "parameter"):
        whole = read[int(parameter.arguments)]
        pieces = [_piece(user, parameter.name, body) for user in users.get(parameter.name, [])]
        if whole and pieces and all(piece is not None for piece in pieces):
            total += min(whole, sum(moved for moved, _ in pieces))
            total -= whole if any(updated for _, updated in pieces) else 0.0  # the buffer's rest is not written
        else:
            total += whole
    return max(total, 0.0)


def _piece(user: Instruction, name: str, body: Computation) -> tuple[float, bool] | None:
    """(bytes of an operand that one instruction touches, whether it updates them); None: all of it."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return sum(array.stored_bytes or array.bytes for array in user.types), False
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        update = body.get(user.operands[1])
        return (sum(array.bytes for array in update.types) if update else 0.0), True
    return None
