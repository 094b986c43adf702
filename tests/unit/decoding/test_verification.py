"""The walk through a verified tree against a recursive one, and the positions and contexts of choices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.decoding import verification
from draftsmith.decoding.verification import choices, walk
from draftsmith.target.sampling import Sampling, next_tokens
from tests.unit.decoding.trees import Node, ancestors, forests, packed


def naive_walk(row: list[Node], chosen: list[int]) -> tuple[list[int], list[int], int]:
    """Descend wherever the target's token is a child; of equal siblings the branch that leads deepest, or the first."""

    def ends(node: int) -> list[int]:
        below = [i for i, n in enumerate(row) if n.parent == node and n.token == chosen[node + 1]]
        return [end for child in below for end in ends(child)] or [node]

    last = max(ends(-1), key=lambda i: (row[i].depth if i >= 0 else 0, -i))
    path = ancestors(row, last)
    held = any(n.parent == last for n in row)
    return path, [*(row[i].token for i in path), chosen[last + 1]], len(path) + held


@given(forests(tokens=3), st.data())
def test_the_walk_equals_a_recursive_one(rows: list[list[Node]], data: st.DataObject) -> None:
    tree = packed(rows)
    chosen = [data.draw(st.lists(st.integers(-1, 2), min_size=1 + tree.size, max_size=1 + tree.size)) for _ in rows]
    verdict = walk(tree, torch.tensor(chosen))
    expected = [naive_walk(row, picks) for row, picks in zip(rows, chosen, strict=True)]
    assert verdict.nodes == [e[0] for e in expected]
    assert verdict.tokens == [e[1] for e in expected]
    assert verdict.reached == [e[2] for e in expected]


def test_the_deeper_of_two_equal_siblings_is_followed() -> None:
    row = [Node(5, -1, 1, 0.0, 0), Node(5, -1, 1, 0.0, 1), Node(6, 1, 2, 0.0, 1)]
    verdict = walk(packed([row]), torch.tensor([[5, 6, 6, 9]]))
    assert verdict.nodes == [[1, 2]]
    assert verdict.tokens == [[5, 6, 9]]
    assert verdict.reached == [2]


def test_reached_tells_a_refused_child_from_a_missing_one() -> None:
    row = [Node(5, -1, 1, 0.0, 0), Node(6, 0, 2, 0.0, 0)]
    tree = packed([row, row, row])
    verdict = walk(tree, torch.tensor([[4, 0, 0], [5, 7, 0], [5, 6, 8]]))
    assert verdict.tokens == [[4], [5, 7], [5, 6, 8]]
    assert verdict.reached == [1, 2, 2]


def test_padding_is_never_accepted() -> None:
    rows = [[], [Node(0, -1, 1, 0.0, 0)]]
    verdict = walk(packed(rows), torch.tensor([[0, 0], [0, 0]]))
    assert verdict.nodes == [[], [0]]


@given(forests(most=6), st.integers(0, 3))
@settings(deadline=None)
def test_choices_use_each_nodes_position_and_ancestors(rows: list[list[Node]], seed: int) -> None:
    """Each row's choice equals that of a sequence that ends with its path."""
    tree = packed(rows)
    vocab = 8
    logits = torch.randn(len(rows), 1 + tree.size, vocab, generator=torch.Generator().manual_seed(seed))
    committed = [[4, 5, 6, 1, 0][: 2 + b] for b in range(len(rows))]
    sampling = Sampling(temperature=0.8, repetition_penalty=3.0, no_repeat_ngram_size=2, seed=seed)
    requests = [f"r{b}" for b in range(len(rows))]
    found = choices(tree, logits, sampling, requests, committed)
    for b, row in enumerate(rows):
        for node in range(-1, len(row)):
            text = [*committed[b], *(row[i].token for i in ancestors(row, node))]
            alone = next_tokens(
                logits[b : b + 1, node + 1 : node + 2], sampling, [requests[b]], torch.tensor([[len(text)]]), [text]
            )
            assert int(found[b, node + 1]) == int(alone)


def test_contexts_come_in_the_order_of_rows() -> None:
    rows = [[Node(1, -1, 1, 0.0, 0), Node(2, 0, 2, 0.0, 0)], [Node(3, -1, 1, 0.0, 0)]]
    contexts = verification._contexts(packed(rows), [[7], [8, 9]])
    assert contexts[:5] == [[7], [7, 1], [7, 1, 2], [8, 9], [8, 9, 3]]
    assert len(contexts) == 6
