"""How much a token is worth training on, by name: the target's own uncertainty, what the drafter lacks, or both.

One sign for all of them: **higher is more valuable**, "keep the largest". Each entry of `SCORES` says which end of its
quantity that is. The target's scores come from `TokenStatistics` alone; the draft-aware ones also need each row's
overlap Σ min(p, q) with the current drafter, and with a reference: a drafter of the same size, trained to its end.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import TokenStatistics


@dataclass(frozen=True, eq=False)
class Evidence:
    """What scores may look at, for N rows of answer tokens.

    Attributes:
        statistics: the target's distribution at each row.
        overlaps: `[N]` float32, Σ min(p, q) with the current drafter, where one is there.
        reference_overlaps: `[N]` float32, the same with a reference drafter.
    """

    statistics: TokenStatistics
    overlaps: Tensor | None = None
    reference_overlaps: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """A token score.

    Attributes:
        compute: `Evidence` of N rows to `[N]` float32, higher = more valuable.
        keeps: which tokens come out on top.
        source: where it comes from.
    """

    compute: Callable[[Evidence], Tensor]
    keeps: str
    source: str


def _disagreement(evidence: Evidence) -> Tensor:
    return 1.0 - _needed(evidence.overlaps, "overlaps", "a drafter")


def _gap(evidence: Evidence) -> Tensor:
    reference = _needed(evidence.reference_overlaps, "reference_overlaps", "a reference drafter")
    return reference - _needed(evidence.overlaps, "overlaps", "a drafter")


def _needed(overlaps: Tensor | None, name: str, what: str) -> Tensor:
    if overlaps is None:
        raise UserError(
            f"this score needs {what} to compare the target with ({name}): in a run, select.drafter or select.reference"
        )
    return overlaps.float()


SFDD = "SFDD (arXiv 2601.18902)"

SCORES: Mapping[str, Score] = {
    "flatness": Score(lambda e: e.statistics.flatness, "flat distributions: cos(p, uniform) high", f"{SFDD} eq. 6"),
    "entropy": Score(lambda e: e.statistics.entropy, "uncertain: Shannon entropy high", f"{SFDD} baseline"),
    "top-1": Score(lambda e: -e.statistics.top1, "uncertain: largest probability low", f"{SFDD} baseline"),
    "margin": Score(lambda e: -e.statistics.margin, "undecided: p(1st) − p(2nd) low", f"{SFDD} baseline"),
    "energy": Score(
        lambda e: e.statistics.energy,
        "unfamiliar: free energy −log Z high (the paper does not say which end it keeps)",
        f"{SFDD} baseline; Liu et al. 2020 (arXiv 2010.03759)",
    ),
    "nll": Score(
        lambda e: e.statistics.nll,
        "surprising: −log p of the answer's token high; its mean over a sample orders as perplexity does",
        f"{SFDD} baseline PPL",
    ),
    "disagreement": Score(_disagreement, "not yet learnt: 1 − Σ min(p, q) with the current drafter high", "ours"),
    "gap": Score(
        _gap,
        "learnable: the reference's overlap high, the current drafter's low (can be negative)",
        "ours, after AdaSPEC's ΔL (arXiv 2510.19779) eq. 9, in acceptance instead of KL",
    ),
    "flatness-x-disagreement": Score(
        lambda e: e.statistics.flatness * _disagreement(e), "flat and not yet learnt", "ours"
    ),
    "flatness-x-gap": Score(lambda e: e.statistics.flatness * _gap(e), "flat and learnable", "ours"),
}
"""Every token score by its name."""

DRAFT_AWARE = frozenset({"disagreement", "gap", "flatness-x-disagreement", "flatness-x-gap"})
"""The scores that need overlaps with a drafter."""


def token_scores(name: str, evidence: Evidence) -> Tensor:
    """The score called `name` of each row. `[N]` float32, higher = more valuable.

    Raises:
        UserError: no score is called so, or it needs overlaps that are not there.
    """
    if name not in SCORES:
        near = difflib.get_close_matches(name, SCORES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"no token score is called {name!r}{hint} There are {', '.join(SCORES)}")
    return SCORES[name].compute(evidence).float()


def available(evidence: Evidence, names: Iterable[str] = tuple(SCORES)) -> dict[str, Tensor]:
    """All of `names` that this evidence is enough for, each `[N]` float32: the columns of a score file."""
    known: set[str] = set(SCORES)
    if evidence.overlaps is None:
        known -= DRAFT_AWARE
    elif evidence.reference_overlaps is None:
        known -= {"gap", "flatness-x-gap"}
    return {name: token_scores(name, evidence) for name in names if name in known}
