"""AdaSPEC's choice over several ranks, here threads that exchange as `ranks.gathered` does: that of all rows."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draftsmith.foundation import ranks
from draftsmith.selection.tokens import DeltaLoss, RowFacts

Found = tuple[Tensor, slice, int] | None


class Exchange:
    """`gathered` among threads that are named by their rank."""

    def __init__(self, world: int) -> None:
        self.brought: list[tuple[Tensor | None, int]] = [(None, 0)] * world
        self.barrier = threading.Barrier(world, timeout=20)

    def __call__(self, values: Tensor | None, label: int, device: object) -> Found:
        own = int(threading.current_thread().name)
        self.brought[own] = (values, label)
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()
        there = [(part, name) for part, name in brought if part is not None]
        if not there:
            return None
        before = sum(len(part) for part, _ in brought[:own] if part is not None)
        size = 0 if values is None else len(values)
        return torch.cat([part for part, _ in there]), slice(before, before + size), there[0][1]


def on_ranks(world: int, work: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("options", [{"scope": "micro-batch"}, {"scope": "running"}, {"keep": "positive"}])
def test_the_choice_is_that_of_all_rows(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three optimiser steps of two unrolled steps each; rank 1 has rows in the first two, rank 2 in the first."""
    generator = torch.Generator().manual_seed(1)
    sizes = [[(7, 4), (5, 0), (3, 2)], [(6, 6), (4, 1), None], [(9, 3), None, None]]  # by optimiser step, by rank
    rows = [[None if s is None else [torch.randn(n, generator=generator) for n in s] for s in step] for step in sizes]
    alone = DeltaLoss(fraction=0.4, momentum=0.5, **options)  # type: ignore[arg-type]
    expected = []
    for step in rows:
        for unrolled in range(2):
            all_rows = torch.cat([own[unrolled] for own in step if own is not None])
            expected.append(alone(all_rows, RowFacts(reference_losses=torch.zeros_like(all_rows)), unrolled))
    monkeypatch.setattr(ranks, "gathered", Exchange(3))
    weights = [DeltaLoss(fraction=0.4, momentum=0.5, **options) for _ in range(3)]  # type: ignore[arg-type]
    found: list[list[Tensor]] = [[] for _ in range(3)]

    def work(rank: int) -> None:
        for step in rows:
            own = step[rank]
            for unrolled in range(2 if own is not None else 0):
                assert own is not None
                losses = own[unrolled]
                facts = RowFacts(reference_losses=torch.zeros_like(losses))
                found[rank].append(weights[rank](losses, facts, unrolled))
            weights[rank].follow(own is not None, torch.device("cpu"))

    on_ranks(3, work)
    taken = [0, 0, 0]
    for number, whole in enumerate(expected):
        parts = []
        for rank in range(3):
            if rows[number // 2][rank] is not None:
                parts.append(found[rank][taken[rank]])
                taken[rank] += 1
        torch.testing.assert_close(torch.cat(parts), whole)
    assert [w.thresholds for w in weights] == [alone.thresholds] * 3
