"""Random trees for property tests, and the same trees as plain Python lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from draftsmith.decoding.tree import DraftTree

WORST = float("-inf")


@dataclass(frozen=True)
class Node:
    token: int
    parent: int
    depth: int
    log_q: float
    owner: int


@st.composite
def forests(draw: st.DrawFn, most: int = 12, tokens: int = 4, batch: int | None = None) -> list[list[Node]]:
    """One list of nodes for each row of a batch; parents first, not ordered by depth. Log probabilities tie often."""
    rows = []
    for _ in range(batch or draw(st.integers(1, 3))):
        nodes: list[Node] = []
        for i in range(draw(st.integers(0, most))):
            parent = draw(st.integers(-1, i - 1))
            above = nodes[parent] if parent >= 0 else Node(0, -1, 0, 0.0, 0)
            step = draw(st.sampled_from([0.0, -0.25, -0.5, -1.0, WORST]))
            token = draw(st.integers(0, tokens - 1))
            nodes.append(Node(token, parent, above.depth + 1, above.log_q + step, draw(st.integers(0, 2))))
        rows.append(nodes)
    return rows


def packed(rows: list[list[Node]]) -> DraftTree:
    """The batch as tensors; padding is filled with what must never be looked at."""
    size = max(map(len, rows))

    def column(name: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        values = [[getattr(n, name) for n in row] + [fill] * (size - len(row)) for row in rows]
        return torch.tensor(values, dtype=dtype).reshape(len(rows), size)

    return DraftTree(
        column("token", 0, torch.int64),
        column("parent", -1, torch.int64),
        column("depth", 1, torch.int64),
        column("log_q", 0.0, torch.float32),
        column("owner", 0, torch.int64),
        torch.tensor([len(row) for row in rows]),
    )


def unpacked(tree: DraftTree) -> list[list[Node]]:
    columns = [t.tolist() for t in (tree.tokens, tree.parents, tree.depths, tree.log_q, tree.owner)]
    return [
        [Node(*(column[b][i] for column in columns)) for i in range(count)]
        for b, count in enumerate(tree.counts.tolist())
    ]


def ancestors(row: list[Node], node: int) -> list[int]:
    """Nodes from the root's child down to `node` itself."""
    path = []
    while node >= 0:
        path.append(node)
        node = row[node].parent
    return path[::-1]
