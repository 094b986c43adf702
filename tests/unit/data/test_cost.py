"""What a pass's parts cost: a target whose every part takes a known time, by a clock that only it moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from tests.tiny import tiny_target
from torch import Tensor

from draftsmith.data import cost
from draftsmith.data.samples import Sample
from draftsmith.target.model import HFTarget


class Timed:
    """A target that reads a position in `body` seconds and projects one in `head`, and the clock that says so."""

    def __init__(self, target: HFTarget, body: float, head: float) -> None:
        self.target, self.body, self.head, self.now = target, body, head, 0.0
        self.spec, self.device = target.spec, target.device
        self.slow = 1.0
        self.reads: list[int] = []

    def read(self, ids: Tensor, lengths: Sequence[int], want: Any) -> Any:
        self.now += self.body * self.slow * sum(lengths)
        self.reads.append(sum(lengths))
        return self.target.read(ids, lengths, want)

    def project(self, hidden: Tensor) -> Tensor:
        self.now += self.head * self.slow * len(hidden)
        return self.target.project(hidden)

    def clock(self) -> float:
        return self.now


def samples(lengths: Sequence[int]) -> list[Sample]:
    return [Sample(f"s{i}", [1 + i % 7] * n, [False] * 2 + [True] * (n - 2), True) for i, n in enumerate(lengths)]


def test_parts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Timed(tiny_target("llama"), body=3.0, head=1.0)
    real = cost.statistics

    def slower(hidden: Tensor, project: Any, following: Tensor, **more: Any) -> Any:
        made.now += (0.25 if "expected" not in more else 0.75) * len(hidden)
        return real(hidden, project, following, **more)

    monkeypatch.setattr(cost, "statistics", slower)
    found = cost.measure(cast(HFTarget, made), samples([9, 5, 5, 4, 7, 8] * 4), 16, made.clock)
    assert (found.body, found.head) == pytest.approx((3.0, 1.0))
    assert (found.scores, found.expected) == pytest.approx((0.25, 0.5))
    assert (found.head_share, found.overhead) == pytest.approx((0.25, 0.0625))
    assert len(made.reads) == cost.BATCHES + 1, "one batch warms up"


def test_a_slow_minute_does_not_count() -> None:
    made = Timed(tiny_target("llama"), body=2.0, head=1.0)
    plain = made.read

    def read(ids: Tensor, lengths: Sequence[int], want: Any) -> Any:
        made.slow = 1.0 if len(made.reads) == 3 else 10.0
        return plain(ids, lengths, want)

    made.read = read  # type: ignore[method-assign]
    found = cost.measure(cast(HFTarget, made), samples([6] * 40), 16, made.clock)
    assert (found.body, found.head) == pytest.approx((2.0, 1.0))


def test_the_real_clock_runs() -> None:
    torch.manual_seed(0)
    found = cost.measure(tiny_target("llama"), samples([12] * 12), 48)
    assert min(found.body, found.head) > 0
    assert 0 < found.head_share < 1
