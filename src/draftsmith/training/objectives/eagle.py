"""EAGLE's objective (2401.15077, §4.2): the target's next final state, and the distribution that follows from it.

    loss = v · SmoothL1(f̂_{p+1}, f_{p+1}) + w · CE(P(· | x_{≤ p+1}), softmax(W f̂_{p+1})),   v = 1, w = 0.1

SmoothL1 is averaged over the features; CE is against the whole distribution. What the head reads is disturbed, so
that it gets used to its own errors: (U − ½) · 0.2 · 512 / length on every feature (the authors' `train/main.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field

from draftsmith.data.features import StoredSample
from draftsmith.drafters.eagle import Eagle
from draftsmith.foundation import seeding
from draftsmith.foundation.options import Options
from draftsmith.numerics.losses import soft_cross_entropy
from draftsmith.target.protocol import FeatureSpec
from draftsmith.training.batches import TrainBatch, collate, counted_starts
from draftsmith.training.objectives.base import StepLosses
from draftsmith.training.objectives.taught import Taught

NOISE_LENGTH = 512  # positions of a text that is disturbed by the noise as it is; shorter ones more


class EagleLossOptions(Options):
    """EAGLE's loss (drafter.kind=eagle)."""

    feature_weight: float = Field(default=1.0, ge=0, description="of SmoothL1 between drafted and true final states")
    token_weight: float = Field(default=0.1, ge=0, description="of the cross-entropy against the target's distribution")
    noise: float = Field(
        default=0.2, ge=0, description="width of the uniform noise on what the head reads, for a text of 512 positions"
    )


@dataclass(frozen=True)
class EagleBatch:
    """Packed rows, and the names of their samples in the order of `rows.unroll.segments`: noise is keyed by them."""

    rows: TrainBatch
    names: tuple[str, ...]

    @property
    def positions(self) -> int:
        return self.rows.positions

    @property
    def counts(self) -> list[int]:
        """Drafts that count at each unrolled step."""
        return self.rows.counts


@dataclass(frozen=True)
class EagleObjective:
    """The terms of EAGLE's loss: one step, from true states. `block_rows`: see `numerics.losses.chunked_head_loss`."""

    head: Eagle
    options: EagleLossOptions
    block_rows: int | None = None

    @property
    def reads(self) -> FeatureSpec:
        return FeatureSpec(final=True)

    def teaches(self, sample: StoredSample) -> bool:
        return bool(counted_starts(sample.mask, 1).any())

    def collate(self, rows: Sequence[Sequence[StoredSample]], device: torch.device) -> EagleBatch:
        return collated(rows, 1, device)

    def losses(self, batch: EagleBatch, draw: Sequence[int | str]) -> Iterator[StepLosses]:
        o = self.options
        for out in self.head.unroll(disturbed(batch, o.noise, draw).unroll, 1):
            rows = Taught(self.head, self.head.output, batch.rows, out, self.block_rows)
            tokens = rows.tokens(soft_cross_entropy)
            reached = torch.ones_like(batch.rows.samples, dtype=torch.float32)  # a first token is
            facts = rows.facts(reached, judged=tokens)
            yield StepLosses("feature", 0, o.feature_weight, rows.feature(), facts)
            yield StepLosses("tokens", 0, o.token_weight, tokens, facts)


def collated(rows: Sequence[Sequence[StoredSample]], steps: int, device: torch.device) -> EagleBatch:
    """Packed samples whose drafts are unrolled `steps` times from the target's final states."""
    names = tuple(sample.id for row in rows for sample in row)
    return EagleBatch(collate(rows, FeatureSpec(final=True), steps, device), names)


def disturbed(batch: EagleBatch, noise: float, draw: Sequence[int | str]) -> TrainBatch:
    """The rows with (U − ½) · noise · 512 / length on what the head reads, U keyed by `draw`, sample and position.

    So a sample is disturbed alike wherever it is packed; what is taught stays as it is.
    """
    rows, unroll = batch.rows, batch.rows.unroll
    if not noise:
        return rows
    real = unroll.segments >= 0
    lengths = torch.bincount(unroll.segments[real], minlength=len(batch.names))
    places = torch.arange(int(lengths.max()), device=real.device).expand(len(batch.names), -1)
    keys = seeding.position_keys(seeding.key(*draw), batch.names, places, "feature-noise")
    drawn = seeding.uniform(keys[unroll.segments[real], unroll.positions[real]], unroll.features.shape[-1]) - 0.5
    width = noise * NOISE_LENGTH / lengths[unroll.segments[real]]
    features = unroll.features.to(torch.float32, copy=True)  # the batch stays as it is
    features[real] += (drawn * width[:, None]).float()
    return replace(rows, unroll=replace(unroll, features=features.to(unroll.features.dtype)))
