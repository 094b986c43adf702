from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.decoding.merging import concatenated, owned
from draftsmith.decoding.routing import confidence, rows_of
from draftsmith.decoding.tree import DraftTree, merged
from tests.unit.decoding.trees import Node, forests, packed, unpacked

pairs = st.integers(1, 3).flatmap(lambda rows: st.tuples(forests(batch=rows), forests(batch=rows)))


@given(pairs)
def test_side_by_side_is_one_list_after_the_other(pair: tuple[list[list[Node]], list[list[Node]]]) -> None:
    one, two = pair
    found = unpacked(concatenated([packed(one), owned(packed(two), 5)]))
    for row, first, second in zip(found, one, two, strict=True):
        shift = len(first)
        moved = [
            Node(n.token, n.parent + shift if n.parent >= 0 else -1, n.depth, n.log_q, n.owner + 5) for n in second
        ]
        assert row == [*first, *moved]


@given(pairs)
def test_a_route_takes_one_tree_a_row(pair: tuple[list[list[Node]], list[list[Node]]]) -> None:
    one, two = pair
    chosen = torch.arange(len(one)) % 2
    found = unpacked(rows_of([packed(one), packed(two)], chosen))
    assert found == [(one, two)[b % 2][b] for b in range(len(one))]


@given(forests())
def test_confidence_is_the_mean_path_probability(rows: list[list[Node]]) -> None:
    for row, found in zip(rows, confidence(packed(rows)).tolist(), strict=True):
        expected = sum(math.exp(n.log_q) for n in row) / len(row) if row else 0.0
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-12)


@given(forests(), st.integers(1, 15))
def test_a_trie_of_a_tree_with_itself_is_its_trie(rows: list[list[Node]], budget: int) -> None:
    tree = packed(rows)
    same = merged([tree], budget)
    twice: DraftTree = merged([tree, owned(tree, 1)], budget)
    assert unpacked(twice) == unpacked(same)


@given(forests())
def test_a_trie_of_a_tree_with_itself_is_itself(rows: list[list[Node]]) -> None:
    """Where siblings differ and nothing is impossible, nothing changes: not even the order."""
    rows = [[replace(n, token=i, log_q=-0.25 * n.depth) for i, n in enumerate(row)] for row in rows]
    tree = packed(rows)
    assert unpacked(merged([tree, owned(tree, 4)], max(tree.size, 1))) == rows
