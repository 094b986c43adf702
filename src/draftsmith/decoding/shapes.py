"""Fixed tree shapes: nodes as ranks of children from the root down; (0, 2) is the third child of the first child."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Path = tuple[int, ...]
Paths = tuple[Path, ...]

# 4 + 5 + 4 + 2 nodes: wide where the first guess may be wrong, deep where all guesses are the likeliest.
STATIC_15: Paths = (
    *((0,), (1,), (2,), (3,)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1)),
)


@dataclass(frozen=True)
class Level:
    """One depth of a fixed shape, as indices for whole tensors.

    Attributes:
        slots: of each node, which of the nodes expanded one depth above it is a child of (0 below the root).
        ranks: of each node, its rank among that node's children.
        parents: of each node, its parent's place among all nodes, depth by depth; −1 below the root.
        inner: which of the nodes are expanded.
        parent_slots: of each expanded node, its parent's place among all expanded nodes; −1 below the root.
    """

    slots: list[int]
    ranks: list[int]
    parents: list[int]
    inner: list[int]
    parent_slots: list[int]


def checked(paths: Paths) -> Paths:
    """The paths as they are. ValueError: none, one twice, negative ranks, or a node whose parent is missing."""
    if not paths or len(set(paths)) < len(paths):
        raise ValueError("paths must be a list of different nodes, at least one")
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"path {list(path)} must be ranks of children, 0 for the likeliest")
        if len(path) > 1 and path[:-1] not in paths:
            raise ValueError(f"path {list(path)} stands below {list(path[:-1])}, which is not among the paths")
    return paths


def levels(paths: Sequence[Path]) -> list[Level]:
    """The shape depth by depth; within a depth nodes are in the order of their paths."""
    expandable = {path[:-1] for path in paths}
    made: list[Level] = []
    above: list[Path] = [()]
    places: dict[Path, int] = {(): -1}
    first_slot = -1  # of `above` among all expanded nodes; the root is none
    for depth in range(1, max(map(len, paths)) + 1):
        nodes = sorted(path for path in paths if len(path) == depth)
        slots = [above.index(path[:-1]) for path in nodes]
        inner = [i for i, path in enumerate(nodes) if path in expandable]
        parents = [places[path[:-1]] for path in nodes]
        made.append(Level(slots, [path[-1] for path in nodes], parents, inner, [first_slot + slots[i] for i in inner]))
        places |= {path: len(places) - 1 + i for i, path in enumerate(nodes)}
        first_slot += len(above)
        above = [nodes[i] for i in inner]
    return made
