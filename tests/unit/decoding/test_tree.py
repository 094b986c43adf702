"""Draft trees against loops over lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.decoding.tree import DraftTree, empty, merged, pruned, take
from tests.unit.decoding.trees import WORST, Node, ancestors, forests, packed, unpacked


def naive_pruned(row: list[Node], budget: int, room: int) -> list[Node]:
    fits = [i for i, n in enumerate(row) if n.log_q > WORST and n.depth <= room]
    kept = sorted(sorted(fits, key=lambda i: (-row[i].log_q, i))[:budget])
    for i in kept:
        assert row[i].parent == -1 or row[i].parent in kept, "the naive rule must keep ancestors by itself"
    place = {old: new for new, old in enumerate(kept)}
    return [Node(row[i].token, place.get(row[i].parent, -1), row[i].depth, row[i].log_q, row[i].owner) for i in kept]


@given(forests())
def test_ancestors_equal_a_walk_up_the_parents(rows: list[list[Node]]) -> None:
    tree = packed(rows)
    found = tree.ancestors()
    for b, row in enumerate(rows):
        for i in range(tree.size):
            expected = ancestors(row, i) if i < len(row) else [i]
            assert found[b, i].nonzero().flatten().tolist() == sorted(expected)


@given(forests(), st.data())
def test_rows_see_the_root_and_their_ancestors(rows: list[list[Node]], data: st.DataObject) -> None:
    tree = packed(rows)
    roots = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    found = tree.rows(torch.tensor(roots))
    for b, row in enumerate(rows):
        assert found.tokens[b, : 1 + len(row)].tolist() == [roots[b], *(n.token for n in row)]
        assert found.depths[b, : 1 + len(row)].tolist() == [0, *(n.depth for n in row)]
        assert found.visible[b, 0].nonzero().flatten().tolist() == [0]
        for i in range(tree.size):
            expected = ancestors(row, i) if i < len(row) else [i]
            assert found.visible[b, 1 + i].nonzero().flatten().tolist() == [0, *(1 + j for j in sorted(expected))]


@given(forests(), st.integers(1, 14), st.data())
def test_pruning_keeps_the_likeliest_nodes_and_their_ancestors(
    rows: list[list[Node]], budget: int, data: st.DataObject
) -> None:
    room = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    found = pruned(packed(rows), budget, None if room is None else torch.tensor(room))
    expected = [naive_pruned(row, budget, 99 if room is None else room[b]) for b, row in enumerate(rows)]
    assert unpacked(found) == expected
    assert found.size == max(map(len, expected))
    assert found.real.sum(dim=1).tolist() == found.counts.tolist()
    again = pruned(found, budget)
    assert unpacked(again) == expected


@given(forests(), st.data())
def test_take_renumbers_parents(rows: list[list[Node]], data: st.DataObject) -> None:
    tree = packed(rows)
    kept = []
    for row in rows:
        tips = data.draw(st.sets(st.integers(0, len(row) - 1)) if row else st.just(set()))
        kept.append(sorted({node for tip in tips for node in ancestors(row, tip)}))
    width = max(map(len, kept))
    # the padding of `chosen` points anywhere
    chosen = torch.tensor([k + [0] * (width - len(k)) for k in kept], dtype=torch.int64).reshape(len(rows), width)
    found = unpacked(take(tree, chosen, torch.tensor([len(k) for k in kept])))

    def paths(row: list[Node], nodes: list[int]) -> list[list[tuple[int, int, float, int]]]:
        return [[(row[j].token, row[j].depth, row[j].log_q, row[j].owner) for j in ancestors(row, i)] for i in nodes]

    for row, nodes, new in zip(rows, kept, found, strict=True):
        assert paths(new, list(range(len(new)))) == paths(row, nodes)


def naive_merged(trees: list[list[Node]], budget: int, room: int) -> list[tuple[tuple[int, ...], float, int]]:
    """A dictionary of paths; (path, log q, owner) of what is kept, in the order of first appearance."""
    trie: dict[tuple[int, ...], tuple[float, int]] = {}
    for row in trees:
        for i, node in enumerate(row):
            path = tuple(row[j].token for j in ancestors(row, i))
            if path not in trie or node.log_q > trie[path][0]:
                trie[path] = (node.log_q, node.owner)
    fits = [path for path, (log_q, _) in trie.items() if log_q > WORST and len(path) <= room]
    kept = set(sorted(fits, key=lambda path: -trie[path][0])[:budget])
    assert all(path[:-1] in kept for path in kept if len(path) > 1), "the naive rule must keep ancestors by itself"
    return [(path, *trie[path]) for path in fits if path in kept]


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=300)
def test_merging_equals_a_dictionary_of_paths(data: st.DataObject, batch: int, count: int, budget: int) -> None:
    trees = [data.draw(forests(most=8, tokens=3, batch=batch)) for _ in range(count)]
    room = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    found = merged([packed(rows) for rows in trees], budget, None if room is None else torch.tensor(room))
    for b, row in enumerate(unpacked(found)):
        expected = naive_merged([rows[b] for rows in trees], budget, 99 if room is None else room[b])
        paths = [tuple(row[j].token for j in ancestors(row, i)) for i in range(len(row))]
        assert [(path, node.log_q, node.owner) for path, node in zip(paths, row, strict=True)] == expected
        assert [node.depth for node in row] == [len(path) for path in paths]


def test_merging_gives_a_node_to_who_is_surer_and_of_equals_to_the_earlier() -> None:
    first = [Node(5, -1, 1, -1.0, 0), Node(6, 0, 2, -1.5, 0)]
    second = [Node(5, -1, 1, -0.5, 1), Node(6, 0, 2, -1.5, 1), Node(7, 0, 2, -0.75, 1)]
    found = unpacked(merged([packed([first]), packed([second])], 9))
    assert found == [[Node(5, -1, 1, -0.5, 1), Node(6, 0, 2, -1.5, 0), Node(7, 0, 2, -0.75, 1)]]
    nothing = empty(1, torch.device("cpu"))
    assert unpacked(merged([nothing, packed([second]), nothing], 2)) == [[second[0], Node(7, 0, 2, -0.75, 1)]]
    assert merged([nothing, nothing], 3).size == 0


def test_merging_refuses_what_is_no_batch() -> None:
    cpu = torch.device("cpu")
    for trees in ([], [empty(1, cpu), empty(2, cpu)]):
        with pytest.raises(ValueError, match="the same batch"):
            merged(trees, 3)


def test_padding_is_never_real() -> None:
    rows = [[Node(1, -1, 1, -1.0, 0)], [Node(2, -1, 1, -1.0, 1), Node(3, 0, 2, -2.0, 1), Node(3, 0, 2, -2.0, 1)]]
    tree = pruned(packed(rows), 3)
    assert tree.real.tolist() == [[True, False, False], [True, True, True]]
    assert tree.log_q[0, 1:].tolist() == [WORST, WORST]


def test_an_empty_tree_is_the_root_alone() -> None:
    tree = empty(2, torch.device("cpu"))
    rows = tree.rows(torch.tensor([4, 5]))
    assert tree.ancestors().shape == (2, 0, 0)
    assert rows.tokens.tolist() == [[4], [5]]
    assert rows.visible.tolist() == [[[True]], [[True]]]
    assert isinstance(pruned(tree, 3), DraftTree)
    assert pruned(tree, 3).size == 0
