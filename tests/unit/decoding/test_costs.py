"""The number of nodes that pays, against trying every number; stored profiles and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.decoding import profile
from draftsmith.decoding.composition import Single
from draftsmith.decoding.costs import (
    affordable,
    at_contexts,
    best_sizes,
    refuse_other_target,
    stored_contexts,
    stored_pass_ms,
    stored_round_costs,
)
from draftsmith.decoding.growth import CostAwareGrowth, DynamicGrowth, GrowthOptions
from draftsmith.decoding.profile import Grid
from draftsmith.foundation.errors import StaleError, UserError
from tests.tiny import tiny_head, tiny_target


@given(
    values=st.lists(
        st.lists(st.floats(0, 1), min_size=5, max_size=5).map(lambda v: sorted(v, reverse=True)), min_size=1, max_size=3
    ),
    costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
)
@settings(max_examples=200, deadline=None)
def test_best_sizes_equal_trying_all(values: list[list[float]], costs: list[float]) -> None:
    """Costs need not rise with the number of nodes, as measured ones do not always."""
    found = best_sizes(torch.tensor(values, dtype=torch.float64), costs).tolist()
    for row, size in zip(values, found, strict=True):
        rates = [(1 + sum(row[:k])) / costs[k] for k in range(min(5, len(costs) - 1) + 1)]
        assert 0 <= size < len(rates)
        assert rates[size] >= max(rates) * (1 - 1e-12)


def test_of_equals_the_smallest() -> None:
    assert best_sizes(torch.tensor([[1.0, 0.0, 0.0]]), [1.0, 2.0, 2.0, 2.0]).tolist() == [0]
    assert best_sizes(torch.tensor([[1.0, 0.0, 0.0]]), [1.0, 1.0, 1.0, 1.0]).tolist() == [1]
    assert best_sizes(torch.zeros((2, 0)), [1.0, 2.0]).tolist() == [0, 0]


def stored(folder: Path, content: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps(content))
    return path


def test_costs_of_a_stored_profile(tmp_path: Path) -> None:
    grown = [
        {"growth": {"kind": "chain", "depth": 4, "width": 2}, "draft_ms": 99.0},
        {"growth": {"kind": "dynamic", "depth": 4, "width": 3}, "draft_ms": 5.0},
        {"growth": {"kind": "dynamic", "depth": 4, "width": 2}, "draft_ms": 3.0},
    ]
    path = stored(tmp_path, {"verify_ms": {"1": 10.0, "4": 16.0}, "growths": grown})
    assert stored_round_costs(path, 5, 4, 2) == (13.0, 15.0, 17.0, 19.0, 23.0, 27.0)
    assert stored_round_costs(path, 1, 4, 3) == (15.0, 17.0)
    assert stored_round_costs(path, 1, 4, 2, draft_ms=0.0, sequences=4) == (16.0, 32.0)
    with pytest.raises(UserError, match=r"profile\.json holds no draft_ms for a tree of depth 3 and width 2"):
        stored_round_costs(path, 5, 3, 2)


@pytest.mark.parametrize(
    "content",
    [[], {}, {"verify_ms": {}}, {"verify_ms": {"one": 2}}, {"verify_ms": {"1": "slow"}}, {"verify_ms": {"1": 0}}],
)
def test_unusable_profiles_are_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"profile\.json.*verify_ms"):
        stored_round_costs(stored(tmp_path, content), 3, 2, 2, draft_ms=1.0)


def test_a_tuned_profile_tells_drafting_by_set(tmp_path: Path) -> None:
    """`tune` keeps what drafting takes on each set; trees that stop early are no measure of whole ones."""
    grown = [
        {"growth": {"kind": "dynamic", "depth": 4, "width": 2, "least_mass": 0.2}, "draft_ms": {"chat": 1.0}},
        {"growth": {"kind": "dynamic", "depth": 4, "width": 2, "least_mass": 0.0}, "draft_ms": {"chat": 3, "math": 5}},
    ]
    path = stored(tmp_path, {"verify_ms": {"1": 10.0, "4": 16.0}, "growths": grown})
    assert stored_round_costs(path, 1, 4, 2) == (14.0, 16.0)


MEASURED: dict[str, Any] = {
    "format": 2,
    "target": {"name": "t", "fingerprint": "abc"},
    "verify": [
        {"batch": batch, "context": context, "ms": {"1": 10.0 * batch + context, "3": 14.0 * batch + context}}
        for batch in (1, 4)
        for context in (100, 300)
    ],
    "drafting": [
        {"drafter": name, "batch": batch, "context": context, "depth": depth, "width": width, "ms": ms * batch}
        for name, unit in (("a", 1.0), ("b", 2.0))
        for batch in (1, 4)
        for context in (100, 300)
        for depth, width, ms in ((1, 2, unit), (5, 2, 9 * unit), (1, 6, 3 * unit), (5, 6, 11 * unit))
    ],
}


def test_costs_of_a_measured_profile(tmp_path: Path) -> None:
    """By rows, batch, context and drafter; drafting is linear between measured depths and widths."""
    path = stored(tmp_path, MEASURED)
    assert stored_contexts(path) == (100, 300)
    assert stored_round_costs(path, 2, 5, 2, drafter="a") == (119.0, 121.0, 123.0)
    assert stored_round_costs(path, 1, 1, 2, drafter="b", context=300) == (312.0, 314.0)
    assert stored_round_costs(path, 1, 3, 2, drafter="a") == (115.0, 117.0)
    assert stored_round_costs(path, 1, 3, 4, drafter="a") == (116.0, 118.0)
    assert stored_round_costs(path, 1, 1, 2, drafter="a", sequences=4) == (144.0, 152.0)
    assert stored_round_costs(path, 1, 9, 9, draft_ms=0.0) == (110.0, 112.0)
    for wrong, said in (
        ({}, r"costs of a, b: say which \(growth\.drafter\)"),
        ({"drafter": "c"}, "costs of a, b"),
        ({"drafter": "a", "sequences": 2}, "measured with 1, 4 sequences together, not with 2"),
        ({"drafter": "a", "context": 7}, "1 sequences of 7 tokens"),
    ):
        with pytest.raises(UserError, match=rf"profile\.json.*{said}"):
            stored_round_costs(path, 1, 1, 2, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="depth 9 and width 2"):
        stored_round_costs(path, 1, 9, 2, drafter="a")
    refuse_other_target(path, "abc")
    with pytest.raises(StaleError, match="another target"):
        refuse_other_target(path, "abd")


@given(st.lists(st.integers(0, 500), min_size=1, max_size=4), st.integers(1, 3))
def test_costs_between_contexts_are_linear(positions: list[int], count: int) -> None:
    contexts = [100, 200, 400][:count]
    table = [[1.0, 2.0], [3.0, 6.0], [3.5, 9.0]][:count]
    found = at_contexts(table, contexts, torch.tensor(positions)).tolist()
    for place, row in zip(positions, found, strict=True):
        place = min(max(place, contexts[0]), contexts[-1])
        for k in range(2):
            expected = table[-1][k]
            for i in range(count - 1):
                if contexts[i] <= place <= contexts[i + 1]:
                    share = (place - contexts[i]) / (contexts[i + 1] - contexts[i])
                    expected = table[i][k] * (1 - share) + table[i + 1][k] * share
            assert row[k] == pytest.approx(expected)


def test_a_sequences_own_length_decides_its_budget(tmp_path: Path) -> None:
    """Where long contexts make rows dear, the longer sequence of a batch verifies less."""
    values = torch.tensor([[0.9, 0.5, 0.3]] * 2, dtype=torch.float64)
    costs = at_contexts([[10.0, 10.1, 10.2, 10.3], [10.0, 11.0, 16.0, 22.0]], [0, 1000], torch.tensor([0, 1000]))
    assert best_sizes(values, costs).tolist() == [3, 1]
    path = stored(tmp_path, MEASURED)
    built = GrowthOptions(kind="cost-aware", profile=path, drafter="a", node_budget=2, depth=5, width=2).build()
    assert built == CostAwareGrowth(
        (119.0, 121.0, 123.0), 5, 2, (100, 300), ((119.0, 121.0, 123.0), (319.0, 321.0, 323.0)), 2.0
    )
    assert stored_pass_ms(path, 5, 6, 4, "b") == 16.0
    assert stored_pass_ms(path, 1, 2, 1, "a") == 0.0
    given = GrowthOptions(kind="cost-aware", profile=path, drafter="a", depth=5, width=2, draft_ms=3.0).build()
    assert isinstance(given, CostAwareGrowth)
    assert given.pass_ms == 0.0, "the user's own figure says nothing of passes"


def test_what_is_measured_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once a reading every pass takes one tick: shapes and counts are what is tested."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(ticks) / 1e3)
    target, head = tiny_target("llama"), tiny_head()
    grid = Grid((1, 2), (8, 16), (1, 3), (1, 3), (1, 2))
    steps: list[int] = []
    found = profile.measured(target, {"mine": head}, grid, 1, lambda: steps.append(1))
    assert len(steps) == grid.steps(1) == 2 * 2 * (1 + 4)
    assert found["target"]["fingerprint"] == target.spec.fingerprint
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    path = stored(tmp_path, found)
    assert stored_contexts(path) == (8, 16)
    assert stored_round_costs(path, 2, 2, 2, sequences=2) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(UserError, match="contexts of up to"):
        profile.measured(target, {}, Grid((1,), (10_000,)), 1)


def test_costs_are_those_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a pass of so many rows of so many sequences behind so long a context."""
    target = tiny_target("llama")
    seen: list[tuple[int, int, int]] = []
    verify = target.verify

    def watched(rows: Any, want: Any) -> Any:
        seen.append((rows.tokens.shape[0], rows.tokens.shape[1], target._cache.lengths[0]))
        return verify(rows, want)

    monkeypatch.setattr(target, "verify", watched)
    found = profile.verify_cost(target, (1, 4), 20, 2, batch=3)
    assert set(found) == {1, 4}
    assert all(ms > 0 for ms in found.values())
    assert seen == [(3, 1, 20), (3, 4, 20)] * 3
    assert profile.draft_cost(target, Single(tiny_head(), DynamicGrowth(4, 2, 2)), 20, 2, batch=3) > 0


def test_a_tree_is_cut_by_costs_of_each_row() -> None:
    from tests.unit.decoding.trees import Node, packed

    row = [Node(5, -1, 1, -0.1, 0), Node(6, 0, 2, -0.5, 0), Node(7, 0, 2, -1.0, 0)]
    costs = torch.tensor([[10.0, 10.1, 10.2, 10.3], [10.0, 11.0, 18.0, 26.0]], dtype=torch.float64)
    assert affordable(packed([row, row]), costs).counts.tolist() == [3, 1]
