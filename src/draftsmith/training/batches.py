"""From stored samples to packed training rows: which samples stand together, and from where drafts are unrolled.

    position          p        p+1       p+2
    the head reads    h_p      e(x_{p+1})
    and is taught               P(· | x_{≤ p+1})   about x_{p+2}

A draft from p counts at unrolled step k if x_{p+1} … x_{p+2+k} are all answer tokens of one turn: what follows the end
of an answer teaches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.data.features import StoredSample
from draftsmith.drafters.unrolled import UnrollBatch
from draftsmith.foundation import seeding
from draftsmith.numerics.distributions import COLUMNS as STATISTICS
from draftsmith.numerics.losses import rounded
from draftsmith.target.protocol import FeatureSpec

REFERENCE = "reference_loss."
"""What a reference's loss of an unrolled step is called among a sample's statistics, the step's number behind it."""


@dataclass(frozen=True)
class TrainBatch:
    """A step's rows.

    Attributes:
        unroll: what the head reads.
        final: `[R, L, H]` the target's final hidden states; log_z: `[R, L]` float32 of its distribution: the teacher.
        counted: `[S, R, Q]` bool, which drafts count at each unrolled step.
        samples: `[R, Q]` int64, index (within the batch) of the sample a start belongs to.
        positions: tokens that are no padding.
        statistics: `[R, L]` by name: the target's `log_norm` and what the source added to the store's (a reference's
            `reference_loss.<step>`), where all samples hold it.
    """

    unroll: UnrollBatch
    final: Tensor
    log_z: Tensor
    counted: Tensor
    samples: Tensor
    positions: int
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Drafts that count at each unrolled step."""
        counts: list[int] = self.counted.flatten(1).sum(1).tolist()
        return counts


def counted_starts(mask: Tensor, steps: int) -> Tensor:
    """`[S, T]` bool: from which positions p of a sample with answer mask `[T]` a draft counts at step k."""
    length = mask.shape[0]
    padded = torch.cat([mask, torch.zeros(steps + 2, dtype=torch.bool)])
    runs = padded[1 : 1 + length] & padded[2 : 2 + length]
    rows = [runs]
    for step in range(1, steps):
        rows.append(rows[-1] & padded[2 + step : 2 + step + length])
    return torch.stack(rows)


def epoch_plan(
    lengths: Sequence[int], row_length: int, batch_positions: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """An epoch's batches: each a list of rows, each row the samples that stand in it, in a keyed random order.

    Samples go first-fit into the batch's open rows of `row_length` positions (a longer sample gets a row of its own),
    so a batch is nearly free of padding; a batch holds about `batch_positions` positions.
    """
    rows_per_batch = max(1, batch_positions // row_length)
    batches: list[list[list[int]]] = []
    rows: list[list[int]] = []
    free: list[int] = []
    for i in seeding.shuffled(len(lengths), "epoch", seed, epoch):
        place = next((r for r, f in enumerate(free) if f >= lengths[i]), None)
        if place is None:
            if len(rows) == rows_per_batch:
                batches.append(rows)
                rows, free = [], []
            rows.append([])
            free.append(row_length)
            place = len(rows) - 1
        rows[place].append(i)
        free[place] -= lengths[i]
    if rows:
        batches.append(rows)
    return batches


def collate(rows: Sequence[Sequence[StoredSample]], wants: FeatureSpec, steps: int, device: torch.device) -> TrainBatch:
    """Pack samples into rows, padded to the longest and on to a multiple (`rounded`)."""
    width = rounded(max(sum(len(s.ids) for s in row) for row in rows))
    size = len(rows)
    first = rows[0][0]
    features = wants.gather(first.hidden)
    assert features is not None
    ids = torch.zeros((size, width), dtype=torch.int64)
    joined = torch.zeros((size, width, features.shape[-1]), dtype=features.dtype)
    final = torch.zeros((size, width, first.hidden["final"].shape[-1]), dtype=features.dtype)
    log_z = torch.zeros((size, width))
    held = set.intersection(*(set(s.statistics) for row in rows for s in row))
    names = sorted(name for name in held if name == "log_norm" or name not in STATISTICS)
    statistics = {name: torch.zeros((size, width)) for name in names}
    segments = torch.full((size, width), -1, dtype=torch.int64)
    positions = torch.zeros((size, width), dtype=torch.int64)
    counted = torch.zeros((steps, size, width), dtype=torch.bool)
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            span = slice(start, start + len(sample.ids))
            ids[r, span] = sample.ids
            gathered = wants.gather(sample.hidden)
            assert gathered is not None
            joined[r, span] = gathered
            final[r, span] = sample.hidden["final"]
            log_z[r, span] = sample.statistics["log_z"]
            for name, column in statistics.items():
                column[r, span] = sample.statistics[name]
            segments[r, span] = number
            positions[r, span] = torch.arange(len(sample.ids))
            counted[:, r, span] = counted_starts(sample.mask, steps)
            start = span.stop
            number += 1
    real = int((segments >= 0).sum())
    starts, active = _compact(counted[0])
    picked = counted.gather(2, starts.expand(steps, -1, -1)) & active
    unroll = UnrollBatch(
        ids.to(device),
        joined.to(device),
        segments.to(device),
        positions.to(device),
        starts.to(device),
        active.to(device),
    )
    return TrainBatch(
        unroll,
        final.to(device),
        log_z.to(device),
        picked.to(device),
        segments.gather(1, starts).to(device),
        real,
        {name: column.to(device) for name, column in statistics.items()},
    )


def _compact(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the true entries of each row `[R, L]`, padded: `[R, Q]` indices and which are real."""
    counts = flags.sum(dim=1)
    width = rounded(int(counts.max()))
    order = flags.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, torch.arange(order.shape[1]) < counts[:, None]
