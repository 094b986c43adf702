"""EAGLE-3's objective (2503.01840, §3): the drafted token's distribution against the target's, at every unrolled step.

    loss = Σ_k w^k · (1 / N_k) Σ_{p counted at k} D( P(· | x_{≤ p+1+k}) ‖ Q_k(· | p) ),   w = 0.8

P over the reduced draft vocabulary is exp(h·W_d − log Z), exact with the mass outside lost; D is forward KL by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.unrolled import StepOut
from draftsmith.numerics.losses import Loss, chunked_head_loss
from draftsmith.training.batches import TrainBatch


class Eagle3Objective:
    """Per-token losses of an unrolled step; never reduced here."""

    def __init__(self, head: Eagle3, teacher_weight: Tensor, loss: Loss, block_rows: int | None = None) -> None:
        self.head = head
        self.teacher_weight = teacher_weight
        self.loss = loss
        self.block_rows = block_rows

    def token_losses(self, out: StepOut, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """Losses `[N]` of the drafts that count at this step, and where they stand: `[N, 2]` (row, start) indices."""
        where = batch.counted[out.step].nonzero()
        row, start = where[:, 0], where[:, 1]
        taught = batch.unroll.starts[row, start] + 1 + out.step
        states = self.head.norm(out.states[row, start])
        values = chunked_head_loss(
            states,
            self.head.lm_head.weight,
            batch.final[row, taught],
            self.teacher_weight,
            batch.log_z[row, taught],
            self.loss,
            self.block_rows,
        )
        return values, where


def combined(steps: list[tuple[Tensor, Tensor]], decay: float) -> Tensor:
    """Σ_k decay^k · Σ w·l / count, from each step's (Σ w·l, count)."""
    total = torch.zeros((), device=steps[0][0].device)
    for k, (value, count) in enumerate(steps):
        total = total + decay**k * value / count.clamp(min=1)
    return total
