"""How a drafter is trained: the options, and the learning rate that follows from them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.numerics import losses
from draftsmith.selection.tokens import WeightOptions

LENGTHS = ("steps", "seconds", "epochs")


class OnPolicyOptions(Options):
    """Which of a draft's training texts it writes itself."""

    share: float = Field(
        default=0.0, ge=0, le=1, description="of the texts: 0 stored answers, 1 its own (on-policy), between them mixed"
    )
    temperature: float = Field(default=1.0, ge=0, description="at which it writes")
    max_new_tokens: int = Field(default=128, ge=1, description="of an answer")
    replay_steps: int = Field(
        default=50, ge=1, description="optimiser steps for which an answer is used again before the draft writes anew"
    )


class TrainOptions(Options):
    """How a drafter is trained. Exactly one of `steps`, `seconds` and `epochs` says how long."""

    steps: int | None = Field(default=None, ge=1, description="optimiser steps")
    seconds: float | None = Field(
        default=None, gt=0, description="time box: the number of steps is fixed after three timed ones"
    )
    epochs: int | None = Field(default=None, ge=1, description="how often each sample is seen")
    rounds: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(),
        description="pruning while it trains: the share of the samples, those of the best score first, that each epoch "
        "sees; the last holds on. [1, 0.7, 0.5]: all, then 70 %, then half. Default: all, always",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="the largest, after warm-up")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="of the learning rate after warm-up: half a cosine down to 0, or constant"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's")
    clip: float = Field(default=1.0, gt=0, description="bound of the gradient")
    clip_by: Literal["norm", "value"] = Field(
        default="norm",
        description="norm: the gradient is scaled to a norm of `clip` at most; value: each entry is cut off (EAGLE and "
        "HASS: 0.5)",
    )
    unroll_steps: int = Field(default=4, ge=1, le=8, description="training-time test: drafted tokens in a row")
    step_decay: float = Field(default=0.8, gt=0, le=1, description="weight of step k is this to the power k")
    detach_steps: bool = Field(default=False, description="no gradient from one unrolled step to the one before")
    checkpoint_steps: bool = Field(
        default=False, description="compute each unrolled step again in the backward pass: less memory, more time"
    )
    loss: str = Field(default="forward-kl", description="divergence from the target's distribution")
    weights: WeightOptions = Field(default=WeightOptions(), description="how much each row of a loss counts")
    judge: str | None = Field(
        default=None, description="divergence that weights compare with a reference's; default: the trained one"
    )
    reference: Literal["trained", "ema"] | Path | None = Field(
        default=None,
        description="for weights that compare losses with another drafter's: the folder of a trained one of the same "
        "kind; trained: one that is trained first, plainly, from the same start; ema: the averaged weights (train.ema)",
    )
    on_policy: OnPolicyOptions = Field(
        default=OnPolicyOptions(), description="texts that a standalone draft writes itself"
    )
    row_length: int = Field(default=512, ge=16, description="positions of a packed row")
    batch_positions: int = Field(default=2048, ge=16, description="positions of a step, over all ranks and parts")
    accumulation: int = Field(
        default=1, ge=1, description="parts in which a rank passes a step's rows: the same step in less memory"
    )
    precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the matrix products; weights are float32"
    )
    evaluations: int = Field(
        default=6, ge=1, description="replays of the dev answers during training, the last at the end"
    )
    patience: int | None = Field(
        default=None, ge=1, description="training ends after so many evaluations without a better one; default: never"
    )
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the averaged weights, which are then validated and kept; 0: none"
    )
    seed: int = 0

    def seen(self, samples: int, epoch: int) -> int:
        """How many of the samples, best first, an epoch (from 0) sees."""
        share = self.rounds[min(epoch, len(self.rounds) - 1)] if self.rounds else 1.0
        return max(1, round(share * samples))

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not said changes no result and is in no fingerprint.
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "rounds" or value}

    @field_validator("loss", "judge")
    @classmethod
    def _known(cls, loss: str | None) -> str | None:
        try:
            losses.by_name(loss or "forward-kl")
        except UserError as problem:
            raise ValueError(str(problem)) from None
        return loss

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if not given:
            raise ValueError("give steps, seconds or epochs: how long to train")
        if len(given) > 1:
            raise ValueError(
                f"only one of steps, seconds and epochs can be given; set the others to null (train.{given[-1]}=null)"
            )
        if self.reference == "ema" and not self.ema:
            raise ValueError(
                "reference is ema, and ema is 0: say how slowly the averaged weights follow (train.ema=0.99)"
            )
        return self


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in a number format while the block runs; weights stay as they are."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine to 0, or constant."""
    warm = max(1, round(options.warmup * steps))
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
