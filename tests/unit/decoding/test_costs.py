"""The number of nodes that pays, against trying every number; stored profiles and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.decoding.costs import best_sizes, stored_round_costs
from draftsmith.foundation.errors import UserError


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
