"""Turns the mma of a basic block into few large matrix products.

A warp's m16n8k16 is far too small for numpy to be efficient. But an mma waits until somebody reads its result (values
never change, so this is always allowed), and until then mma can be merged:
* along k: an mma whose C is the otherwise unused D of a waiting one continues its sum;
* along n and m: waiting chains that share their A or B fragments form a grid of row tiles and column tiles, and the
  whole grid is one product per warp.
An ldmatrix whose results all go to mma keeps them as rows of memory (see `ldmatrix.MatrixRows`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from ..assembly import Operation
from ..registry import block_pass
from .ldmatrix import MatrixLoad
from .matrix import MmaNode, kind_name
from .matrix_kind import MmaKind

Steps = tuple[tuple[str, ...], ...]


@dataclass
class _Chain:
    """mma that sum into one accumulator: fragments of A and B step by step, first C and last D."""

    kind: MmaKind
    c: tuple[str, ...]
    d: tuple[str, ...]
    a: list[tuple[str, ...]]
    b: list[tuple[str, ...]]
    index: int


@dataclass
class _Waiting:
    """The mma that nobody has needed yet."""

    chains: dict[tuple[str, ...], _Chain] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def add(self, node: MmaNode, uses: Counter[str]) -> None:
        chain = self.chains.get(node.c)
        if chain is not None and self.can_continue(node, chain, uses):
            del self.chains[node.c]
            self.names.difference_update(node.c)
            chain.a.append(node.a)
            chain.b.append(node.b)
            chain.d = node.d
        else:
            chain = _Chain(node.kind, node.c, node.d, [node.a], [node.b], node.index)
        self.chains[node.d] = chain
        self.names.update(node.d)

    @staticmethod
    def can_continue(node: MmaNode, chain: _Chain, uses: Counter[str]) -> bool:
        return (
            chain.kind == node.kind
            and len(chain.a) < node.kind.longest_chain
            and all(uses[name] == 1 for name in node.c)
        )

    def blocks(self, node: MmaNode, uses: Counter[str]) -> bool:
        """Whether the waiting mma must be done before `node` can wait with them."""
        if self.names.intersection(node.a, node.b):
            return True
        if not self.names.intersection(node.c):
            return False
        chain = self.chains.get(node.c)
        return chain is None or not self.can_continue(node, chain, uses)


def _grids(chains: list[_Chain]) -> list[list[list[_Chain]]]:
    """Chains arranged in grids: rows share A, columns share B, and every place is taken once."""
    rows: dict[tuple[MmaKind, Steps, int], dict[Steps, _Chain]] = {}
    for chain in chains:
        repeat = 0
        while tuple(chain.b) in rows.get((chain.kind, tuple(chain.a), repeat), {}):
            repeat += 1
        rows.setdefault((chain.kind, tuple(chain.a), repeat), {})[tuple(chain.b)] = chain
    grids: dict[tuple[MmaKind, int, frozenset[Steps]], list[list[_Chain]]] = {}
    for (kind, a, _), by_column in rows.items():
        grid = grids.setdefault((kind, len(a), frozenset(by_column)), [])
        order = [tuple(chain.b) for chain in grid[0]] if grid else list(by_column)
        grid.append([by_column[column] for column in order])
    return list(grids.values())


def _nested(steps: list[Steps]) -> str:
    def one(items: list[str]) -> str:
        return f"({', '.join(items)},)"

    return one([one([one(list(fragment)) for fragment in tile]) for tile in steps])


def _operation(grid: list[list[_Chain]], outside: set[str]) -> Operation:
    first = grid[0][0]
    a = [tuple(row[0].a) for row in grid]
    b = [tuple(chain.b) for chain in grid[0]]
    flat = [chain for row in grid for chain in row]
    a_names, b_names = (
        [name for tile in tiles for fragment in tile for name in fragment if name.startswith("v")] for tiles in (a, b)
    )  # the others are constants, such as the selectors of scales
    keep = (outside.issuperset(a_names), outside.issuperset(b_names))
    c = ", ".join(f"({', '.join(chain.c)},)" for chain in flat)
    writes = tuple(name for chain in flat for name in chain.d)
    code = (
        f"{', '.join(writes)}, = mma_tiles(G, {kind_name(first.kind)}, {_nested(a)}, {_nested(b)}, ({c},), {keep}, "
        f"{first.index})"
    )
    reads = tuple(dict.fromkeys([*a_names, *b_names, *(name for chain in flat for name in chain.c)]))
    return Operation(code, reads, writes, "matrix", pure=False)


def _values_from_outside(operations: list[Operation]) -> set[str]:
    """Values that come from before the block, also through views: the same arrays as long as nobody writes them."""
    names: set[str] = set()
    for operation in operations:
        from_register = operation.family == "registers" and not operation.reads
        if from_register or (operation.family == "views" and names.issuperset(operation.reads)):
            names.update(operation.writes)
    return names


def _keep_rows(operations: list[Operation], kept: set[str]) -> list[Operation]:
    """Lets every ldmatrix whose results are only read as A or B of mma return its rows as they lie in memory."""
    readers: dict[str, list[Operation]] = {}
    for operation in operations:
        for name in operation.reads:
            readers.setdefault(name, []).append(operation)

    def only_fragments(name: str) -> bool:
        return name not in kept and all(
            isinstance(reader.payload, MmaNode) and name not in reader.payload.c for reader in readers.get(name, ())
        )

    result = []
    for operation in operations:
        load = operation.payload
        if isinstance(load, MatrixLoad):
            parts = [name for reader in readers.get(operation.writes[0], ()) for name in reader.writes]
            if all(map(only_fragments, parts)):
                operation = replace(operation, code=load.rows_code)
        result.append(operation)
    return result


@block_pass
def fuse_mma(operations: list[Operation], kept: set[str]) -> list[Operation]:
    """Replaces every operation with an `MmaNode` by the products described above. kept: values read after the block."""
    if not any(isinstance(operation.payload, MmaNode) for operation in operations):
        return operations
    uses: Counter[str] = Counter(kept)
    for operation in operations:
        uses.update(operation.reads)
    outside = _values_from_outside(operations)
    operations = _keep_rows(operations, kept)
    result: list[Operation] = []
    waiting = _Waiting()

    def flush() -> None:
        nonlocal waiting
        result.extend(_operation(grid, outside) for grid in _grids(list(waiting.chains.values())))
        waiting = _Waiting()

    for operation in operations:
        node = operation.payload
        if isinstance(node, MmaNode):
            if waiting.blocks(node, uses):
                flush()
            waiting.add(node, uses)
            continue
        if waiting.names.intersection(operation.reads):
            flush()
        result.append(operation)
    flush()
    return result
