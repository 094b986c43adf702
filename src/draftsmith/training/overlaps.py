"""How much of the target's distribution a head already has, token by token: Σ min(p, q), the chance of acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftsmith.data.features import StoredSample, plan
from draftsmith.training.objectives.base import SampleSource
from draftsmith.training.objectives.eagle3 import Eagle3Objective


@torch.no_grad()
def overlaps(
    objective: Eagle3Objective, source: SampleSource, ids: Sequence[str], batch_positions: int = 4096
) -> Iterator[tuple[StoredSample, Tensor]]:
    """Each sample with `[T]` float32: at row t how the head's distribution over token t + 1 overlaps with the target's.

    The head drafts from true features (the first unrolled step), and what its draft vocabulary lacks is no overlap.
    Rows at which no draft counts (the prompt, an answer's first token, the last row) are NaN.
    """
    known = dict(zip(source.ids, source.lengths, strict=True))
    lengths = [known[i] for i in ids]
    for group in plan(lengths, batch_positions):
        samples = source.fetch([ids[i] for i in group], 0)
        batch = objective.collate([[sample] for sample in samples], objective.head.device)
        found = torch.full(batch.unroll.ids.shape, float("nan"), device=objective.head.device)
        out = next(objective.head.unroll(batch.unroll, 1))
        row, start = batch.counted[0].nonzero().unbind(1)
        found[row, batch.unroll.starts[row, start] + 1] = objective.taught(out, batch).acceptance().float()
        for sample, values in zip(samples, found.cpu(), strict=True):
            yield sample, values[: len(sample.ids)]
