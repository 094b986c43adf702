"""EAGLE-3's objective (2503.01840, §3): the drafted token's distribution against the target's, at every unrolled step.

    loss = Σ_k w^k · (1 / N_k) Σ_{p counted at k} D( P(· | x_{≤ p+1+k}) ‖ Q_k(· | p) ),   w = 0.8

P over the reduced draft vocabulary is exp(h·W_d − log Z), exact with the mass outside lost; D is forward KL by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.features import StoredSample
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.unrolled import StepOut
from draftsmith.numerics.losses import Loss
from draftsmith.target.protocol import FeatureSpec
from draftsmith.training.batches import TrainBatch, collate, counted_starts
from draftsmith.training.objectives.base import StepLosses
from draftsmith.training.objectives.taught import Taught


@dataclass(frozen=True)
class Eagle3Objective:
    """The terms of EAGLE-3's loss.

    Attributes:
        head: what is trained.
        teacher_weight: `[Vd, H]` rows of the target's output embedding for the draft vocabulary.
        loss: D.
        steps: unrolled steps; step_decay: w.
        detach_steps: no gradient from one unrolled step to the one before.
        checkpoint_steps: compute each step again in the backward pass.
        survival: whether token weights ask for the chance that a draft's earlier tokens are accepted, another pass
            through the head.
        judge: the divergence that token weights compare with a reference's; none: D.
        block_rows: rows of one block of logits; default: what 64 MiB hold.
    """

    head: Eagle3
    teacher_weight: Tensor
    loss: Loss
    steps: int = 1
    step_decay: float = 1.0
    detach_steps: bool = False
    checkpoint_steps: bool = False
    survival: bool = False
    judge: Loss | None = None
    block_rows: int | None = None

    @property
    def reads(self) -> FeatureSpec:
        return self.head.wants | FeatureSpec(final=True)

    def teaches(self, sample: StoredSample) -> bool:
        return bool(counted_starts(sample.mask, 1).any())

    def collate(self, rows: Sequence[Sequence[StoredSample]], device: torch.device) -> TrainBatch:
        return collate(rows, self.head.wants, self.steps, device)

    def losses(self, batch: TrainBatch, draw: Sequence[int | str]) -> Iterator[StepLosses]:
        survival = torch.ones_like(batch.samples, dtype=torch.float32) if self.survival else None
        for out in self.head.unroll(batch.unroll, self.steps, self.detach_steps, self.checkpoint_steps):
            rows = self.taught(out, batch)
            values, _ = self.token_losses(out, batch)
            judged = None
            if self.judge is not None:
                with torch.no_grad():
                    judged = rows.tokens(self.judge)
            yield StepLosses("kl", out.step, self.step_decay**out.step, values, rows.facts(survival, judged))
            if survival is not None and out.step + 1 < self.steps:
                rows.survived(survival)

    def taught(self, out: StepOut, batch: TrainBatch) -> Taught:
        """The drafts that count at a step."""
        return Taught(self.head, self.teacher_weight, batch, out, self.block_rows)

    def token_losses(self, out: StepOut, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """Losses `[N]` of the drafts that count at this step, and where they stand: `[N, 2]` (row, start) indices."""
        rows = self.taught(out, batch)
        return rows.tokens(self.loss), rows.where
