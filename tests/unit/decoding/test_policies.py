"""Each growth policy against itself written node by node in plain Python."""

from __future__ import annotations

import gc
import heapq
import json
import math
from collections.abc import Sequence
from pathlib import Path as File

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from draftsmith.decoding.growth import (
    AdaEDLGrowth,
    BestFirstGrowth,
    CostAwareGrowth,
    DynamicGrowth,
    Growth,
    GrowthOptions,
    Limits,
    StaticGrowth,
)
from draftsmith.decoding.shapes import STATIC_15
from draftsmith.decoding.stopping import EntropyStop
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import digest, validate
from draftsmith.target.vocabulary import VocabMap
from tests.unit.decoding.test_growth import Expanded, Path, Table, eagle2, same
from tests.unit.decoding.trees import ancestors, unpacked


def limits(room: Sequence[int], ends: Sequence[int] = ()) -> Limits:
    return Limits(torch.tensor(room), torch.tensor(ends, dtype=torch.int64))


def rounds(
    table: Table, growth: Growth, state: Expanded, room: Sequence[int], ends: Sequence[int] = ()
) -> list[dict[Path, float]]:
    """One round: what each row's tree holds, by path of tokens."""
    state.paths = [[] for _ in room]
    proposal = table.observe(state, torch.zeros((len(room), 1)), None, [1] * len(room))
    rows = unpacked(growth.grow(table, state, proposal, limits(room, ends)))
    for row in rows:
        assert all(node.parent < i for i, node in enumerate(row))
        assert all(node.depth == (row[node.parent].depth if node.parent >= 0 else 0) + 1 for node in row)
    found = [{tuple(row[j].token for j in ancestors(row, i)): n.log_q for i, n in enumerate(row)} for row in rows]
    assert all(len(path) == len(row) for path, row in zip(found, rows, strict=True)), "a path stands twice in a tree"
    return found


def grown(table: Table, growth: Growth, room: Sequence[int], ends: Sequence[int] = ()) -> list[dict[Path, float]]:
    return rounds(table, growth, table.start(len(room), 0), room, ends)


def ranked(table: Table, b: int, path: Path) -> list[tuple[float, int]]:
    """(log q, target id) after a path, likeliest first."""
    pairs = [(float(q), int(t)) for q, t in zip(table.row(b, path), table.vocab.target_ids, strict=True)]
    return sorted(pairs, key=lambda pair: -pair[0])


shapes = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=8).map(
    lambda deep: tuple(sorted({tuple(path[:n]) for path in deep for n in range(1, len(path) + 1)}, key=hash))
)


@given(seed=st.integers(0, 10**6), paths=shapes, size=st.integers(2, 6), room=st.lists(st.integers(0, 5), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_static_tree_is_its_paths(seed: int, paths: tuple[Path, ...], size: int, room: list[int]) -> None:
    """Paths in any order; ranks beyond the vocabulary, nodes beyond the room and below an end token are left out."""
    table = Table(seed, VocabMap(torch.arange(1, size + 1), 9))
    end = 1
    for b, found in enumerate(grown(table, StaticGrowth(paths), room, [end])):
        expected = set()
        for ranks in paths:
            tokens: Path = ()
            value = 0.0
            for rank in ranks:
                if rank >= size or (tokens and tokens[-1] == end) or len(tokens) >= room[b]:
                    break
                log_q, token = ranked(table, b, tokens)[rank]
                tokens, value = (*tokens, token), value + log_q
            else:
                expected.add((tokens, value))
        same(found, expected)


def test_the_default_static_tree_by_hand() -> None:
    table = Table(4, VocabMap.identity(8))
    found = grown(table, StaticGrowth(), [9])[0]
    assert len(found) == StaticGrowth().budget == 15
    assert [sum(len(path) == d for path in found) for d in (1, 2, 3, 4)] == [4, 5, 4, 2]
    first = [token for _, token in ranked(table, 0, ())[:4]]
    assert {path for path in found if len(path) == 1} == {(t,) for t in first}
    assert {path[1] for path in found if len(path) == 2 and path[0] == first[0]} == {
        token for _, token in ranked(table, 0, (first[0],))[:3]
    }
    assert {len(path) for path in table.asked} == {1, 2, 3}
    assert sum(len(path) == 1 for path in table.asked) == 3, "only nodes with children are expanded"


def heap_tree(
    table: Table, b: int, budget: int, depth: int, width: int, room: int, ends: set[int]
) -> set[tuple[Path, float]]:
    """Best-first as the textbook has it: pop the likeliest node, push its children."""
    taken: set[tuple[Path, float]] = set()
    heap: list[tuple[float, Path]] = []

    def push(path: Path, value: float) -> None:
        if len(path) < min(depth, room) and not (path and path[-1] in ends):
            for log_q, token in ranked(table, b, path)[:width]:
                heapq.heappush(heap, (-(value + log_q), (*path, token)))

    push((), 0.0)
    while heap and len(taken) < budget:
        negative, path = heapq.heappop(heap)
        taken.add((path, -negative))
        push(path, -negative)
    return taken


@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(1, 30),
    depth=st.integers(1, 6),
    width=st.integers(1, 5),
    size=st.integers(2, 8),
    room=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    ends=st.sets(st.integers(1, 3), max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_best_first_takes_what_a_heap_would(
    seed: int, budget: int, depth: int, width: int, size: int, room: list[int], ends: set[int]
) -> None:
    table = Table(seed, VocabMap(torch.arange(1, size + 1), 9))
    found = grown(table, BestFirstGrowth(budget, depth, width), room, sorted(ends))
    for b, row in enumerate(found):
        same(row, heap_tree(table, b, budget, depth, width, room[b], ends))


def test_best_first_goes_deeper_than_it_is_wide_in_few_passes() -> None:
    """Eight nodes take seven passes one at a time; depth by depth as many as the tree is deep, and no idle one."""
    table = Table(11, VocabMap.identity(6))
    found = grown(table, BestFirstGrowth(8, 7, 3), [9])[0]
    deepest = max(map(len, found))
    passes = {len(path) for path in table.asked}
    assert passes <= set(range(1, deepest + 1))
    assert len(passes) < 7


def chain(table: Table, b: int, depth: int, room: int, gamma: float, threshold: float, end: int) -> list[Path]:
    """AdaEDL by hand: the first token always, each later one while 1 − sqrt(γH) of its own distribution is ≥ λ."""
    path: Path = ()
    paths = []
    while len(path) < min(depth, room) and not (path and path[-1] == end):
        q = [math.exp(log_q) for log_q, _ in ranked(table, b, path)]
        bound = 1 - math.sqrt(gamma * -sum(p * math.log(p) for p in q))
        if path and bound < threshold:
            break
        path = (*path, ranked(table, b, path)[0][1])
        paths.append(path)
    return paths


@given(seed=st.integers(0, 10**6), depth=st.integers(1, 7), room=st.lists(st.integers(0, 8), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_chain_stops_where_the_bound_is_below_the_threshold(seed: int, depth: int, room: list[int]) -> None:
    table = Table(seed, VocabMap.identity(5))
    threshold = 0.5  # entropies of the table's rows are about 1.1 to 1.6 nats: bounds 0.43 to 0.53
    found = grown(table, AdaEDLGrowth(depth, EntropyStop(start=threshold)), room, [2])
    for b, row in enumerate(found):
        assert list(row) == chain(table, b, depth, room[b], 0.2, threshold, 2)


def test_chains_of_different_lengths_and_no_pass_after_the_last() -> None:
    table = Table(0, VocabMap.identity(5))
    lengths = {}
    for seed in range(30):
        table = Table(seed, VocabMap.identity(5))
        row = grown(table, AdaEDLGrowth(6, EntropyStop(start=0.5)), [9])[0]
        lengths[len(row)] = seed
        # the pass that shows the entropy of the first token not drafted is needed, none behind it
        assert len(table.asked) == min(len(row), 5)
    assert {1, 2, 3} <= lengths.keys()
    grown(table := Table(0, VocabMap.identity(5)), AdaEDLGrowth(6, EntropyStop(start=0.0)), [2, 1])
    assert {len(path) for path in table.asked} == {1}, "no pass for what there is no room for"


def test_the_threshold_follows_each_sequence() -> None:
    """Three rounds by hand: sequence 0 is always accepted whole, sequence 1 never, sequence 2 does not go on."""
    stop = EntropyStop(start=0.0, goal=0.5, smoothing=0.75, step=0.1)
    growth = AdaEDLGrowth(3, stop)
    table = Table(1, VocabMap.identity(5))
    state = table.start(3, 0)
    room = [20, 20, 20]
    rates, values = [0.5] * 3, [0.0] * 3
    for _ in range(3):
        found = rounds(table, growth, state, room)
        for b, row in enumerate(found):
            assert list(row) == chain(table, b, 3, room[b], 0.2, values[b], 99)
        known = growth._remembered.of(state)
        assert known is not None
        assert known.value.tolist() == pytest.approx(values)
        assert known.rate.tolist() == pytest.approx(rates)
        accepted = [len(found[0]), 0, None]
        for b, a in enumerate(accepted):
            if a is None:
                continue
            room[b] -= a + 1
            rates[b] = 0.75 * rates[b] + 0.25 * a / len(found[b])
            values[b] = min(1.0, max(0.0, values[b] + (0.1 if rates[b] < 0.5 else -0.1)))
    assert values == pytest.approx([0.0, 0.3, 0.0])


def test_batches_in_turn_do_not_disturb_each_other_and_are_forgotten() -> None:
    growth = AdaEDLGrowth(3, EntropyStop(start=0.0, step=0.25))
    table = Table(1, VocabMap.identity(5))
    one, other = table.start(1, 0), table.start(2, 0)
    for i in range(3):
        rounds(table, growth, one, [20 - i])  # one token a round: nothing was accepted
        rounds(table, growth, other, [20 - 4 * i] * 2)  # always all three
    first, second = growth._remembered.of(one), growth._remembered.of(other)
    assert first is not None
    assert second is not None
    assert first.value.tolist() == [0.5]
    assert second.value.tolist() == [0.0, 0.0]
    assert len(growth._remembered) == 2
    del one
    gc.collect()
    assert len(growth._remembered) == 1


@given(
    seed=st.integers(0, 10**6),
    costs=st.lists(st.floats(0.1, 9), min_size=2, max_size=20).map(sorted),
    room=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_the_cost_aware_budget_is_the_best_of_all(seed: int, costs: list[float], room: list[int]) -> None:
    table = Table(seed, VocabMap.identity(6))
    found = grown(table, CostAwareGrowth(tuple(costs), 4, 3), room, [3])
    for b, row in enumerate(found):
        whole = eagle2(table, b, 10**6, 4, 3, room[b], {3})
        best = sorted((math.exp(value) for _, value in whole), reverse=True)
        rates = [(1 + sum(best[:k])) / costs[k] for k in range(min(len(best), len(costs) - 1) + 1)]
        size = rates.index(max(rates))
        same(row, eagle2(table, b, size, 4, 3, room[b], {3}))


@given(
    seed=st.integers(0, 10**6),
    costs=st.lists(st.floats(6, 20), min_size=2, max_size=20).map(sorted),
    pass_ms=st.floats(0.1, 1.9),
    room=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_a_cost_aware_tree_is_as_deep_as_a_pass_may_pay(
    seed: int, costs: list[float], pass_ms: float, room: list[int]
) -> None:
    table, depth, width = Table(seed, VocabMap.identity(6)), 4, 3
    found = grown(table, CostAwareGrowth(tuple(costs), depth, width, pass_ms=pass_ms), room, [3])
    for b, row in enumerate(found):

        def rates(level: int, reached: int, more: Sequence[float] = (), b: int = b) -> list[float]:
            known = eagle2(table, b, 10**6, level, width, room[b], {3})
            best = sorted([*(math.exp(value) for _, value in known), *more], reverse=True)
            now = [cost - (depth - reached) * pass_ms for cost in costs]
            return [(1 + sum(best[:k])) / now[k] for k in range(min(len(best), len(costs) - 1) + 1)]

        level = 1
        while level < min(depth, room[b]):
            known = eagle2(table, b, 10**6, level, width, room[b], {3})
            last = sorted(((value, path) for path, value in known if len(path) == level), reverse=True)[:width]
            sure = [math.exp(value) for value, path in last if path[-1] != 3]
            if max(rates(level, level + 1, sure)) <= max(rates(level, level)):
                break
            level += 1
        deepest = max((len(path) for path, _ in eagle2(table, b, 10**6, level, width, room[b], {3})), default=1)
        found_rates = rates(level, deepest)
        same(row, eagle2(table, b, found_rates.index(max(found_rates)), level, width, room[b], {3}))


def test_passes_are_spared_where_they_cannot_pay() -> None:
    """The same drafter and the same costs of verifying: what a draft pass costs decides how many are made."""

    def passes(pass_ms: float) -> int:
        table = Table(2, VocabMap.identity(6))
        grown(table, CostAwareGrowth(tuple(20.0 + k / 8 for k in range(16)), 6, 4, pass_ms=pass_ms), [9])
        return max((len(path) for path in table.asked), default=0)

    assert passes(0.0) == 5, "all six depths"
    assert 5 > passes(1e-3) >= passes(1.5) >= passes(3.9), "what can't come among fifteen nodes is not drafted"
    assert passes(1e-3) > passes(3.9)


def test_options_build_the_policies(tmp_path: File) -> None:
    assert GrowthOptions(kind="static").build() == StaticGrowth(STATIC_15)
    assert GrowthOptions(kind="static", paths=((0,), (0, 1))).build() == StaticGrowth(((0,), (0, 1)))
    assert GrowthOptions(kind="best-first", node_budget=9, depth=6, width=2).build() == BestFirstGrowth(9, 6, 2)
    adaedl = GrowthOptions(kind="adaedl", depth=7, gamma=0.3, threshold=0.4, goal=0.7, smoothing=0.9, step=0.02)
    assert adaedl.build() == AdaEDLGrowth(7, EntropyStop(0.3, 0.4, 0.7, 0.9, 0.02))
    stored = tmp_path / "profile.json"
    stored.write_text(json.dumps({"verify_ms": {"1": 10, "3": 14, "5": 30}, "draft_ms": 2}))
    aware = GrowthOptions(kind="cost-aware", node_budget=3, profile=stored)
    assert aware.build() == CostAwareGrowth((12.0, 14.0, 16.0, 24.0), 4, 4)
    assert GrowthOptions(kind="cost-aware", node_budget=1, profile=stored, draft_ms=0, sequences=2).build() == (
        CostAwareGrowth((12.0, 22.0), 4, 4)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "cost-aware"},
        {"kind": "static", "paths": []},
        {"kind": "static", "paths": [[0], [1, 0]]},
        {"kind": "static", "paths": [[0], [0]]},
        {"kind": "static", "paths": [[]]},
        {"kind": "static", "paths": [[-1]]},
        {"kind": "adaedl", "gamma": 0},
        {"kind": "adaedl", "threshold": 1.5},
        {"kind": "adaedl", "smoothing": 1.0},
        {"kind": "cost-aware", "profile": "p.json", "sequences": 0},
        {"kind": "cost-aware", "profile": "p.json", "draft_ms": -1},
        {"kind": "widest"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GrowthOptions(**wrong)


def test_a_missing_profile_is_named(tmp_path: File) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        GrowthOptions(kind="cost-aware", profile=tmp_path / "nowhere.json").build()


@pytest.mark.parametrize(
    "options",
    [
        GrowthOptions(),
        GrowthOptions(kind="chain", depth=3),
        GrowthOptions(kind="static", paths=((0,), (1,))),
        GrowthOptions(kind="adaedl", gamma=0.1),
        GrowthOptions(kind="cost-aware", profile=File("p.json"), sequences=4),
    ],
    ids=lambda options: options.kind,
)
def test_options_survive_being_stored(options: GrowthOptions) -> None:
    stored = json.loads(json.dumps(options.model_dump(mode="json")))
    assert validate(GrowthOptions, stored, "here") == options


def test_what_another_kind_reads_is_in_no_fingerprint() -> None:
    assert digest(GrowthOptions(gamma=0.9)) == digest(GrowthOptions())
    assert digest(GrowthOptions(kind="adaedl", gamma=0.9)) != digest(GrowthOptions(kind="adaedl"))
    assert set(GrowthOptions().model_dump()) == {"kind", "node_budget", "depth", "width", "least_mass"}
    assert GrowthOptions().build() == DynamicGrowth(15, 4, 4)
