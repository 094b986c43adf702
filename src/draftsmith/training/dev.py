"""What checkpoints are chosen by: acceptance length on stored dev answers, walked round by round as decoding would."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import Growth, GrowthOptions
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import ranks
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.replay import StoredAnswer


class DeployOptions(Options):
    """Where the drafter will be served: checkpoints are chosen by what drafts there."""

    server: Literal["vllm", "sglang", "transformers"] = Field(description="it drafts chains")
    speculative_tokens: int = Field(default=3, ge=1, description="drafted tokens of a round")

    @property
    def growth(self) -> GrowthOptions:
        """How it drafts, as a growth."""
        return GrowthOptions(kind="chain", depth=self.speculative_tokens, node_budget=self.speculative_tokens)


@dataclass(frozen=True)
class Dev:
    """What checkpoints are chosen by: acceptance length on stored answers, with the growth of the deployment."""

    spec: TargetSpec
    answers: Sequence[StoredAnswer]
    growth: Growth


def acceptance_length(drafter: nn.Module, weights: Mapping[str, Tensor], dev: Dev) -> float:
    """τ of a drafter with `weights` in place of its own, in the number format of the deployment; ranks share answers.

    Raises:
        UserError: there is no round in the answers.
    """
    made = deployed(drafter, weights, getattr(torch, dev.spec.dtype))
    answers = ranks.share(dev.answers)
    device = next(drafter.parameters()).device
    rounds_of = replay(Single(made, dev.growth), dev.spec, answers, device=device) if answers else []
    counts = metrics.count(rounds_of)
    committed, rounds = ranks.sums([counts.committed, counts.rounds])
    if not rounds:
        raise UserError(
            f"none of the {len(dev.answers)} dev answers is longer than one token, so checkpoints can't be "
            "compared: take more dev prompts (data.dev) or longer answers (regenerate.max_new_tokens)"
        )
    return committed / rounds


def deployed(drafter: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A copy of a drafter to decode with: its parameters (those in `weights` replaced) in another number format.

    What a drafter only refers to (its target's embedding, held outside its parameters) is shared, not copied.
    """
    known: dict[int, Any] = {id(tensor): tensor for tensor in _referred(drafter)}
    for name, parameter in drafter.named_parameters():
        value = weights.get(name, parameter).detach()
        known[id(parameter)] = nn.Parameter(value.to(dtype, copy=True), requires_grad=False)
    return copy.deepcopy(drafter, known).eval()


def _referred(drafter: nn.Module) -> Iterator[Tensor]:
    for module in drafter.modules():
        for value in vars(module).values():
            yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor))
