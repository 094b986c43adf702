"""Growth against EAGLE-2 written node by node in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, GrowthOptions, Limits
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from tests.unit.decoding.trees import ancestors, unpacked

Path = tuple[int, ...]


@dataclass
class Expanded:
    paths: list[list[Path]] = field(default_factory=list)


class Table:
    """Proposes from a keyed table: log q of a child depends on the sequence and the path of target ids above it."""

    def __init__(self, seed: int, vocab: VocabMap) -> None:
        self.seed, self.vocab = seed, vocab
        self.asked: list[Path] = []

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    def start(self, batch: int, capacity: int) -> Expanded:
        return Expanded([[] for _ in range(batch)])

    def observe(self, state: Expanded, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        return Proposal(torch.stack([self.row(b, ()) for b in range(len(lengths))])[:, None])

    def expand(self, state: Expanded, frontier: Frontier) -> Proposal:
        rows = []
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            new = [(*(state.paths[b][p] if p >= 0 else ()), t) for t, p in zip(tokens, parents, strict=True)]
            assert all(len(path) == frontier.depth for path in new)
            state.paths[b] += new
            self.asked += new
            rows.append(torch.stack([self.row(b, path) for path in new]))
        return Proposal(torch.stack(rows))

    def row(self, b: int, path: Path) -> Tensor:
        key = torch.tensor(seeding.key("table", self.seed, b, *path))
        return (seeding.uniform(key, self.vocab.size).float() * 4).log_softmax(-1)


def eagle2(
    table: Table, b: int, budget: int, depth: int, width: int, room: int, ends: set[int], least: float = 0.0
) -> set[tuple[Path, float]]:
    """Expand the `width` likeliest nodes of each depth, `width` children each; then the `budget` likeliest of all.

    Nothing is expanded once the probabilities of what would be (end tokens aside) sum up to less than `least`.
    """

    def children(path: Path, value: float) -> list[tuple[Path, float]]:
        if path and path[-1] in ends:
            return []
        q = [(float(x), int(t)) for x, t in zip(table.row(b, path), table.vocab.target_ids, strict=True)]
        best = sorted(q, key=lambda pair: -pair[0])[:width]
        return [((*path, token), value + log_q) for log_q, token in best]

    level = children((), 0.0)
    pool = list(level)
    for _ in range(1, min(depth, room)):
        frontier = sorted(level, key=lambda node: -node[1])[:width]
        if sum(math.exp(value) for path, value in frontier if path[-1] not in ends) < least:
            break
        level = [child for path, value in frontier for child in children(path, value)]
        pool += level
    fits = [node for node in pool if len(node[0]) <= room]
    return set(sorted(fits, key=lambda node: -node[1])[:budget])


def grown(
    table: Table, growth: ChainGrowth | DynamicGrowth, room: list[int], ends: Sequence[int] = ()
) -> list[dict[Path, float]]:
    state = table.start(len(room), 0)
    proposal = table.observe(state, torch.zeros((len(room), 1)), None, [1] * len(room))
    tree = growth.grow(table, state, proposal, Limits(torch.tensor(room), torch.tensor(ends, dtype=torch.int64)))
    rows = unpacked(tree)
    for row in rows:
        assert all(node.parent < i for i, node in enumerate(row))
        assert all(node.depth == (row[node.parent].depth if node.parent >= 0 else 0) + 1 for node in row)
    return [{tuple(row[j].token for j in ancestors(row, i)): node.log_q for i, node in enumerate(row)} for row in rows]


def same(found: dict[Path, float], expected: set[tuple[Path, float]]) -> None:
    assert found.keys() == {path for path, _ in expected}
    for path, value in expected:
        assert found[path] == pytest.approx(value, abs=1e-5)


@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(1, 40),
    depth=st.integers(1, 5),
    width=st.integers(1, 5),
    size=st.integers(2, 9),
    room=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    least=st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.6]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_dynamic_tree_is_eagle_2s(
    seed: int, budget: int, depth: int, width: int, size: int, room: list[int], least: float, data: st.DataObject
) -> None:
    """Rows with different room, end tokens that are never expanded, widths beyond the vocabulary, reduced ones."""
    ids = data.draw(st.lists(st.integers(0, 11), min_size=size, max_size=size, unique=True))
    ends = data.draw(st.sets(st.sampled_from(ids), max_size=2))
    vocab = VocabMap(torch.tensor(sorted(ids)), 12)
    table = Table(seed, vocab)
    found = grown(table, DynamicGrowth(budget, depth, width, least), room, sorted(ends))
    assert len(found) == len(room)
    for b, row in enumerate(found):
        same(row, eagle2(table, b, budget, depth, width, room[b], ends, least))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_chain_is_the_greedy_path(depth: int) -> None:
    table = Table(3, VocabMap(torch.tensor([1, 4, 5, 7]), 9))
    for b, row in enumerate(grown(table, ChainGrowth(depth), [9, 2, 0])):
        path: Path = ()
        value, expected = 0.0, set()
        for _ in range(min(depth, [9, 2, 0][b])):
            best = int(table.row(b, path).argmax())
            value += float(table.row(b, path)[best])
            path = (*path, int(table.vocab.target_ids[best]))
            expected.add((path, value))
        same(row, expected)


def test_no_more_passes_than_there_is_room_for() -> None:
    table = Table(1, VocabMap.identity(6))
    grown(table, DynamicGrowth(10, 5, 2), [2, 1])
    assert {len(path) for path in table.asked} == {1}
    table.asked.clear()
    grown(table, DynamicGrowth(10, 5, 2), [0, 0])
    assert table.asked == []


def test_passes_that_promise_too_little_are_not_made() -> None:
    table = Table(1, VocabMap.identity(6))
    grown(table, DynamicGrowth(10, 5, 2, 0.99), [9, 9])
    assert table.asked == []


def test_a_chain_stops_at_an_end_token() -> None:
    table = Table(5, VocabMap.identity(6))
    first = int(table.row(0, ()).argmax())
    assert list(grown(table, ChainGrowth(4), [9], [first])[0]) == [(first,)]


def test_options_build_what_they_say() -> None:
    assert GrowthOptions(kind="chain", depth=3).build() == ChainGrowth(3)
    assert GrowthOptions(node_budget=9, depth=3, width=2).build() == DynamicGrowth(9, 3, 2)
    with pytest.raises(ValidationError):
        GrowthOptions(node_budget=0)
