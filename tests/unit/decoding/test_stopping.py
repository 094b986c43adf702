"""AdaEDL's bound and threshold by hand."""

from __future__ import annotations

import math

import pytest
import torch

from draftsmith.decoding.stopping import EntropyStop, Thresholds, acceptance_bound, committed, fresh


def test_the_bound_by_hand() -> None:
    q = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    entropies = [1.5 * math.log(2), 0.0, 2 * math.log(2)]
    expected = [1 - math.sqrt(0.2 * h) for h in entropies]
    assert acceptance_bound(q.log(), 0.2).tolist() == pytest.approx(expected, abs=1e-7)


def test_the_bound_falls_below_zero_where_nothing_is_known() -> None:
    assert float(acceptance_bound(torch.full((50_000,), -math.log(50_000)), 0.2)) == pytest.approx(
        1 - math.sqrt(0.2 * math.log(50_000)), abs=1e-5
    )


def test_the_update_by_hand() -> None:
    """Rows: 3 of 4 accepted; none of 4; nothing committed; nothing drafted; more written than drafted."""
    stop = EntropyStop(start=0.5, goal=0.8, smoothing=0.5, step=0.01)
    before = Thresholds(
        torch.full((5,), 0.5, dtype=torch.float64),
        torch.tensor([1.0, 0.8, 0.8, 0.8, 0.8], dtype=torch.float64),
        torch.tensor([4, 4, 4, 0, 2]),
        torch.tensor([20, 20, 20, 20, 20]),
    )
    after = committed(before, torch.tensor([16, 19, 20, 19, 10]), stop)
    assert after.rate.tolist() == pytest.approx([0.875, 0.4, 0.8, 0.8, 0.9])
    assert after.value.tolist() == pytest.approx([0.49, 0.51, 0.5, 0.5, 0.49])
    assert after.room.tolist() == [16, 19, 20, 19, 10]


@pytest.mark.parametrize(("start", "taken", "expected"), [(1.0, 1, 1.0), (0.0, 5, 0.0)])
def test_the_threshold_stays_between_0_and_1(start: float, taken: int, expected: float) -> None:
    stop = EntropyStop(start=start, step=0.3)
    now = fresh(torch.tensor([9]), stop)
    now = Thresholds(now.value, now.rate, torch.tensor([4]), now.room)
    assert committed(now, torch.tensor([9 - taken]), stop).value.tolist() == [expected]
