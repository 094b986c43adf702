"""HASS's objective (2408.15766, §3): EAGLE's head taught what decoding asks of it.

Harmonised objective distillation: the K tokens that the target finds likeliest count once more,
−Σ_{x ∈ top-K(P)} P(x) · log Q(x). Harmonised context alignment: at step j the head reads its own states of the steps
before, as queries and as the last j − 1 keys and values (`drafters/unrolled.py`).

    loss = 1/n Σ_j β^{j−1} · [ v · SmoothL1 + w · CE + u · top-K ],   n = 3, β = 1, v = u = 1, w = 0.1, K = 10

As in the authors' code, no gradient flows from one step to the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from draftsmith.data.features import StoredSample
from draftsmith.drafters.eagle import Eagle
from draftsmith.numerics.losses import soft_cross_entropy, top_k_distillation
from draftsmith.target.protocol import FeatureSpec
from draftsmith.training.batches import counted_starts
from draftsmith.training.objectives.base import StepLosses
from draftsmith.training.objectives.eagle import EagleBatch, EagleLossOptions, EagleObjective, collated, disturbed
from draftsmith.training.objectives.taught import Taught


class HassLossOptions(EagleLossOptions):
    """HASS's loss (drafter.kind=hass)."""

    top_k_weight: float = Field(default=1.0, ge=0, description="of the distillation over the likeliest tokens")
    top_k: int = Field(default=10, ge=1, description="how many those are")
    steps: int = Field(default=3, ge=1, le=8, description="alignment steps: drafted tokens in a row")
    step_decay: float = Field(default=1.0, gt=0, le=1, description="weight of step j is this to the power j - 1")
    detach_steps: bool = Field(default=True, description="no gradient from one alignment step to the one before")
    checkpoint_steps: bool = Field(
        default=False, description="compute each step again in the backward pass: less memory, more time"
    )
    first_phase: int = Field(
        default=0,
        ge=0,
        description="optimiser steps with EAGLE's own loss before alignment begins (the authors: 40 of 50 epochs)",
    )


@dataclass(frozen=True)
class HassObjective:
    """The terms of HASS's loss. `survival`: whether token weights ask for the chance that a draft's earlier tokens are
    accepted, another pass through the output; `block_rows`: see `numerics.losses.chunked_head_loss`."""

    head: Eagle
    options: HassLossOptions
    survival: bool = False
    block_rows: int | None = None

    @property
    def reads(self) -> FeatureSpec:
        return FeatureSpec(final=True)

    def teaches(self, sample: StoredSample) -> bool:
        return bool(counted_starts(sample.mask, 1).any())

    def collate(self, rows: Sequence[Sequence[StoredSample]], device: torch.device) -> EagleBatch:
        return collated(rows, self.options.steps, device)

    def losses(self, batch: EagleBatch, draw: Sequence[int | str]) -> Iterator[StepLosses]:
        """The last of `draw` is the optimiser step, which tells the phase."""
        o = self.options
        if int(draw[-1]) < o.first_phase:
            yield from EagleObjective(self.head, o, block_rows=self.block_rows).losses(batch, draw)
            return

        # One pass through the output for both: it is what a step costs.
        def distilled(log_p: Tensor, log_q: Tensor) -> Tensor:
            likeliest = top_k_distillation(log_p, log_q, k=o.top_k)
            return o.token_weight * soft_cross_entropy(log_p, log_q) + o.top_k_weight * likeliest

        unroll = disturbed(batch, o.noise, draw).unroll
        survival = torch.ones_like(batch.rows.samples, dtype=torch.float32) if self.survival else None
        for out in self.head.unroll(unroll, o.steps, o.detach_steps, o.checkpoint_steps):
            weight = o.step_decay**out.step / o.steps
            rows = Taught(self.head, self.head.output, batch.rows, out, self.block_rows)
            tokens = rows.tokens(distilled)
            facts = rows.facts(survival, judged=tokens)
            yield StepLosses("feature", out.step, weight * o.feature_weight, rows.feature(), facts)
            yield StepLosses("tokens", out.step, weight, tokens, facts)
            if survival is not None and out.step + 1 < o.steps:
                rows.survived(survival)
