"""Token weights: how much each row of a loss counts. Any objective takes any of them.

A weight of 1 for every row is plain training: the trainer divides Σ weight·loss by the number of rows, all of them, so
weights with mean 1 keep the learning rate's meaning. Weights carry no gradient.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, Protocol, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from draftsmith.foundation import ranks
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options

Scope = Literal["micro-batch", "sample", "running"]
Normalise = Literal["kept", "all"]
Keep = Literal["share", "positive", "least"]


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What weights may look at beside the losses, for the N rows of one micro-batch at one unrolled step.

    Attributes:
        samples: `[N]` int64, which sample a row belongs to.
        flatness: `[N]` float32, the target's flatness at each row.
        reference_losses: `[N]` float32, the same loss of a reference drafter.
        survival: `[N]` float32, the probability that all that was drafted before this row is accepted.
        judged: `[N]` float32, the drafter's own loss that is to be compared with the reference's, where it is not the
            one that is trained.
        places: `[N]` int64, at which position of its sample a row is taught: where its reference's loss is stored.
    """

    samples: Tensor | None = None
    flatness: Tensor | None = None
    reference_losses: Tensor | None = None
    survival: Tensor | None = None
    judged: Tensor | None = None
    places: Tensor | None = None


class TokenWeights(Protocol):
    """The seam of every objective."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts that must be there beside `samples`."""
        ...

    def __call__(self, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        """Weights `[N]` float32 without gradient for losses `[N]`; `step` counts unrolled steps from 0."""
        ...


def uniform_weights(losses: Tensor) -> Tensor:
    """1 for every row. `[N]` to `[N]` float32."""
    return torch.ones_like(losses, dtype=torch.float32, requires_grad=False)


def flatness_weights(flatness: Tensor, *, power: float = 1.0, mean: float | None = None) -> Tensor:
    """flatness^power divided by its mean. `[N]` to `[N]` float32.

    Args:
        flatness: `[N]`.
        power: above 1 sharpens, 0 is uniform.
        mean: that of flatness^power over the corpus: then a row's weight does not depend on its micro-batch. By default
            that of these rows, so that the weights have mean 1.
    """
    raised = flatness.detach().float() ** power
    return raised / (raised.mean() if mean is None else mean)


def kept_count(n_rows: int, fraction: float) -> int:
    """How many of n rows AdaSPEC's code keeps: those at or above the linear (1 − k)-quantile, ties aside.

    Source: AdaSPEC `utils.py`, `delta >= quantile(delta, 1 - k)`.
    """
    # the quantile stands at place (1 − k)·(n − 1); the margin undoes the rounding of 1 − k
    return n_rows - math.ceil((1.0 - fraction) * (n_rows - 1) - 1e-9) if n_rows else 0


def largest(values: Tensor, fraction: float, samples: Tensor | None = None) -> Tensor:
    """True for the `kept_count` largest rows (of each sample, where `samples` says which a row belongs to).

    Of equal values the earlier row goes first. `[N]` float, `[N]` int64 to `[N]` bool.
    """
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    groups = [torch.arange(len(values), device=values.device)]
    if samples is not None:
        groups = [(samples == sample).nonzero().squeeze(-1) for sample in samples.unique()]
    for rows in groups:
        order = values.detach()[rows].argsort(descending=True, stable=True)
        mask[rows[order[: kept_count(len(rows), fraction)]]] = True
    return mask


def mask_weights(mask: Tensor, normalise: Normalise) -> Tensor:
    """Weights of kept rows, 0 elsewhere. `[N]` bool to `[N]` float32.

    "kept": rows ÷ kept rows, so that the loss is the mean over what was kept (AdaSPEC eq. 10). "all": 1, so that it is
    the sum over what was kept divided by the number of all rows (AdaSPEC's code; the learning rate shrinks k-fold).
    """
    weights = mask.float()
    return weights / weights.mean() if normalise == "kept" and bool(mask.any()) else weights


def prefix_survival(acceptances: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The probability that a drafted token is reached: the product of the acceptances before it.

    `[..., K]` acceptance probabilities Σ min(p, q) of a chain of K drafted tokens to `[..., K]`; the first is 1. What
    follows a rejected token is thrown away, however good it is.

    Args:
        acceptances: `[..., K]` between 0 and 1.
        smoothing: a in ã = (1 − a)·α + a, which keeps late tokens alive while the drafter is bad (D-PACE, arXiv
            2605.18810, a = 0.5).
    """
    smoothed = (1.0 - smoothing) * acceptances.detach() + smoothing
    reached = smoothed.cumprod(-1)
    return torch.cat([torch.ones_like(reached[..., :1]), reached[..., :-1]], dim=-1)


def chain_survival(acceptances: Tensor, counted: Tensor, depth: int) -> Tensor:
    """How likely a chain reaches each token of a text: (1 / K) Σ_{j<K} Π_{1≤i≤j} α_{t−i}, for chains of K tokens.

    A token is the j-th of a round after its first if the j before it were accepted, and any of the K places is as
    likely as another before anything is known. It is 1 where all before it is sure, 1/K behind a token that is never
    accepted: there a round always begins anew.

    Args:
        acceptances: `[..., L]` Σ min(p, q) at each row.
        counted: `[..., L]` bool, rows that a chain may stand on; a chain does not reach over the others.
        depth: K.

    Returns:
        `[..., L]` float32.
    """
    before = torch.nn.functional.pad((acceptances.detach() * counted).float()[..., :-1], (1, 0))
    reached = torch.ones_like(before)
    total = reached.clone()
    for _ in range(1, depth):
        # reached_j(t) = α_{t−1} · reached_{j−1}(t − 1)
        reached = before * torch.nn.functional.pad(reached[..., :-1], (1, 0))
        total = total + reached
    return total / depth


@dataclass(frozen=True)
class Uniform:
    """Plain training."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        return uniform_weights(losses)


@dataclass(frozen=True)
class Flatness:
    """Flat tokens count more; see `flatness_weights`."""

    needs: ClassVar[tuple[str, ...]] = ("flatness",)
    power: float = 1.0
    mean: float | None = None

    def __call__(self, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        return flatness_weights(_needed(facts.flatness, "flatness"), power=self.power, mean=self.mean)


@dataclass
class DeltaLoss:
    """AdaSPEC: only the rows with the largest ΔL = loss − reference loss count: bad, and learnable. Eq. 9 and 10.

    Attributes:
        fraction: k, the share of rows that is kept.
        scope: among which rows: those of the micro-batch (the authors' code), those of each sample (eq. 10), or all so
            far: "running" compares with a moving average of the micro-batches' thresholds. Micro-batches are those of
            all ranks together.
        normalise: see `mask_weights`; eq. 10 is "kept", the code "all".
        keep: "share": the fraction of largest ΔL; "positive": every row with ΔL > 0, however many: k follows the
            drafter. `fraction` and `scope` don't count then. "least": the fraction of smallest ΔL, the opposite of
            what AdaSPEC does, for its ablation (table 2).
        anneal: share of the training over which k falls from 1 to `fraction`, in a straight line; 0: k is constant.
        momentum: of the running threshold.
        survival: whether kept rows count as often as decoding would reach them, too (`RowFacts.survival`).
        thresholds: the running threshold of each unrolled step: the state, to be saved with a checkpoint.
        progress: share of the training that is done, told by whoever trains; for `anneal`.
    """

    fraction: float = 0.4
    scope: Scope = "micro-batch"
    normalise: Normalise = "kept"
    keep: Keep = "share"
    anneal: float = 0.0
    momentum: float = 0.9
    survival: bool = False
    thresholds: dict[int, float] = field(default_factory=dict)
    progress: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise UserError(f"delta-loss: fraction must be above 0 and at most 1, not {self.fraction}")
        choices = (("scope", Scope), ("normalise", Normalise), ("keep", Keep))
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                there = ", ".join(get_args(allowed))
                raise UserError(f"delta-loss: {name} must be one of {there}, not {getattr(self, name)!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"delta-loss: momentum must be at least 0 and below 1, not {self.momentum}")
        if not 0.0 <= self.anneal <= 1.0:
            raise UserError(f"delta-loss: anneal must be from 0 to 1, not {self.anneal}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference_losses", "survival") if self.survival else ("reference_losses",)

    def __call__(self, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        own = losses if facts.judged is None else facts.judged
        excess = own.detach() - _needed(facts.reference_losses, "reference_losses").detach()
        if self.together:
            found = ranks.gathered(excess, step, excess.device)
            assert found is not None
            everyone, mine, _ = found
            weights = self._mask(everyone, facts, step)[mine] if len(everyone) else uniform_weights(excess)
        else:
            weights = self._mask(excess, facts, step) if len(excess) else uniform_weights(excess)
        if self.survival:
            weights = weights * _needed(facts.survival, "survival").detach().float()
        return weights

    @property
    def together(self) -> bool:
        """Whether rows are compared with those of all ranks' parts: the ranks call it in step (`follow`)."""
        return self.scope != "sample" or self.keep == "positive"

    def follow(self, busy: bool, device: torch.device) -> None:
        """All ranks, after a part: let those that had one no more wait for each other, and let those without one
        (`busy` is False) see what the others' rows are compared with."""
        found = ranks.gathered(None, 0, device)
        while not busy and found is not None:
            everyone, _, step = found
            if len(everyone):
                self._mask(everyone, RowFacts(), step)
            found = ranks.gathered(None, 0, device)

    @property
    def current(self) -> float:
        """k now."""
        if self.progress >= self.anneal:
            return self.fraction
        return 1.0 + (self.fraction - 1.0) * self.progress / self.anneal

    def _mask(self, excess: Tensor, facts: RowFacts, step: int) -> Tensor:
        if self.keep == "positive":
            return mask_weights(excess > 0, self.normalise)
        if self.keep == "least":
            excess = -excess
        if self.scope == "micro-batch":
            return mask_weights(largest(excess, self.current), self.normalise)
        if self.scope == "running":
            # with k = 1 all count, also what lies below the average of the smallest
            kept = (
                excess >= self._moved(excess, step) if self.current < 1.0 else torch.ones_like(excess, dtype=torch.bool)
            )
            return mask_weights(kept, self.normalise)
        samples = _needed(facts.samples, "samples")
        mask = largest(excess, self.current, samples)
        if self.normalise == "all":
            return mask.float()
        # each sample keeps its own share of the loss
        _, places, rows = samples.unique(return_inverse=True, return_counts=True)
        kept = places[mask].bincount(minlength=len(rows))
        share: Tensor = (rows / kept)[places]
        return mask.float() * share

    def _moved(self, excess: Tensor, step: int) -> float:
        here = float(torch.quantile(excess.double(), 1.0 - self.current))
        before = self.thresholds.get(step, here)
        self.thresholds[step] = self.momentum * before + (1.0 - self.momentum) * here
        return self.thresholds[step]


@dataclass(frozen=True)
class PrefixSurvival:
    """Rows count as often as decoding would reach them; see `prefix_survival`. Not normalised: late steps shrink."""

    needs: ClassVar[tuple[str, ...]] = ("survival",)

    def __call__(self, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        return _needed(facts.survival, "survival").detach().float()


_BY_NAME: dict[str, type[Uniform] | type[Flatness] | type[DeltaLoss] | type[PrefixSurvival]] = {
    "uniform": Uniform,
    "flatness": Flatness,
    "delta-loss": DeltaLoss,
    "prefix-survival": PrefixSurvival,
}

NAMES = tuple(_BY_NAME)
"""The token weights that `by_name` knows."""


def by_name(name: str, **options: float | str | bool | None) -> TokenWeights:
    """Token weights by their name, with options: `by_name("delta-loss", fraction=0.4, scope="sample")`.

    Raises:
        UserError: no such weights, no such option, or a value out of range.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"no token weights are called {name!r}{hint} There are {', '.join(NAMES)}")
    kind: Callable[..., TokenWeights] = _BY_NAME[name]
    known = [option.name for option in fields(_BY_NAME[name]) if option.name not in ("thresholds", "progress")]
    for option in options:
        if option not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"the token weights {name!r} have no option {option!r}; known: {there}")
    return kind(**options)


class WeightOptions(Options):
    """Token weights by name, with the options of their own; what is not given is theirs to choose."""

    name: Literal["uniform", "flatness", "delta-loss", "prefix-survival"] = Field(
        default="uniform",
        description="flatness: flat tokens count more; delta-loss: only what is worse than the reference by most "
        "(AdaSPEC); prefix-survival: as often as decoding reaches it",
    )
    power: float | None = Field(default=None, description="of the flatness; above 1 sharpens (flatness)")
    mean: float | None = Field(
        default=None, gt=0, description="of flatness^power over the corpus; default: each micro-batch's (flatness)"
    )
    fraction: float | None = Field(default=None, description="share of the rows that is kept (delta-loss)")
    scope: Scope | None = Field(default=None, description="among which rows (delta-loss)")
    normalise: Normalise | None = Field(
        default=None, description="kept: mean over what is kept; all: over all rows (delta-loss)"
    )
    momentum: float | None = Field(default=None, description="of the running threshold (delta-loss)")
    keep: Keep | None = Field(
        default=None,
        description="share: the fraction; positive: all that is worse than the reference; least: the fraction that "
        "is worse by least, to compare with (delta-loss)",
    )
    anneal: float | None = Field(
        default=None, description="share of the training over which the fraction falls from 1 (delta-loss)"
    )
    survival: bool | None = Field(
        default=None, description="kept rows count as often as decoding reaches them, too (delta-loss)"
    )

    @model_validator(mode="after")
    def _its_own(self) -> Self:
        try:
            self.build()
        except UserError as problem:
            raise ValueError(str(problem)) from None
        return self

    def build(self) -> TokenWeights:
        """The weights that these options describe, with a fresh state."""
        given = {name: value for name, value in self if name != "name" and value is not None}
        return by_name(self.name, **given)


def _needed(facts: Tensor | None, name: str) -> Tensor:
    if facts is None:
        raise UserError(f"these token weights need {name} of each row, which were not stored or computed")
    return facts
