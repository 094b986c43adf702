"""Full-information routing (HedgeSpec, 2510.20064): the committed path scores every drafter, not only who drafted it.

With h the depth to which a member's drafts would have been accepted along a round's committed tokens, K the depth
looked at, the round's expected accepted length is estimated as EAL = 1 + h and its loss as 1 − EAL / (K + 1). The
paper's EAL weighs with the target's probabilities; here the target's own token is the sample, which is unbiased and
needs no distribution, so that a stored answer can be replayed. Where the round committed fewer than K tokens, h is
censored there, for all members alike.

Feedback arrives after the round, so a choice knows the rounds before it and never its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from draftsmith.decoding.composition import Composition, Seat, Single, children_of
from draftsmith.decoding.hindsight import Counted, accepted_depths, unrolled
from draftsmith.decoding.routing import Committed, Route, first_hits
from draftsmith.foundation import seeding

Scheme = Literal["normal", "hedge"]
Feedback = Literal["first", "path"]


def normal_hedge(regrets: Sequence[float]) -> list[float]:
    """NormalHedge's weights (Chaudhuri, Freund & Hsu 2009): w_i ∝ [R_i]₊ / c · exp([R_i]₊² / 2c), c such that the mean
    of exp([R_i]₊² / 2c) is e. No rate to choose; its regret to the best of N is O(√(T log N) + log² N).

    Args:
        regrets: R_i = Σ (loss of the mixture − loss of i), higher where i did better.

    Returns:
        Weights that sum to 1; uniform where no regret is positive.
    """
    positive = [max(r, 0.0) for r in regrets]
    most = max(positive)
    if most <= 0:
        return [1 / len(regrets)] * len(regrets)
    # In z = R²/2c the mean of exp(z_i) falls as c grows: for c = R²/2 of the largest it is at most e, for c = R²/2
    # divided by 1 + log N at least e.
    low, high = most**2 / 2 / (1 + math.log(len(regrets))), most**2 / 2
    for _ in range(100):
        c = (low + high) / 2
        if math.fsum(math.exp(p**2 / (2 * c)) for p in positive) / len(positive) > math.e:
            low = c
        else:
            high = c
    raw = [p / high * math.exp(p**2 / (2 * high)) for p in positive]
    total = math.fsum(raw)
    return [w / total for w in raw]


def hedge(regrets: Sequence[float], rate: float) -> list[float]:
    """Hedge's weights (Freund & Schapire 1997): w_i ∝ exp(rate · R_i), summing to 1."""
    most = max(regrets)
    raw = [math.exp(rate * (r - most)) for r in regrets]
    total = math.fsum(raw)
    return [w / total for w in raw]


def updated(regrets: Sequence[float], played: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Regrets after a round: the mixture that was *played* in it lost Σ played_i · losses_i."""
    mixture = math.fsum(p * loss for p, loss in zip(played, losses, strict=True))
    return [r + mixture - loss for r, loss in zip(regrets, losses, strict=True)]


@dataclass
class Standing:
    """One batch: what the members bring from earlier requests, and what each sequence learned since.

    Attributes:
        brought: `[members]` regrets.
        own: `[B][members]` regrets of this batch's rounds.
        played: `[B][members]` the weights of the last choice.
        names: of each sequence, a number made from its prompt, for its draws.
        rounds: rounds chosen for so far.
    """

    brought: list[float]
    own: list[list[float]]
    played: list[list[float]]
    names: list[int] = field(default_factory=list)
    rounds: int = 0

    def regrets(self, b: int) -> list[float]:
        return [x + y for x, y in zip(self.brought, self.own[b], strict=True)]


@dataclass
class HedgeRule:
    """Which member drafts, by weights that every committed path moves. One instance learns over all that it decodes.

    Attributes:
        depths, children: of each member, how deep and how wide it drafts.
        scheme: `normal` (NormalHedge) or `hedge` with `rate`.
        feedback: `first`: whether the first committed token was among a member's likeliest, which costs nothing more
            than reading; `path`: the member's own unroll along the committed path, a pass for each depth that it
            follows.
        pick: `draw` from the weights, as the regret bound wants it, or take the `best`.
        every: rounds between two lessons; members that do not draft read only then.
        carry: how much of the regrets a new batch starts with.
        seed: of the draws, which are keyed by prompt and round.
    """

    depths: tuple[int, ...]
    children: tuple[int, ...]
    scheme: Scheme = "normal"
    feedback: Feedback = "first"
    pick: Literal["draw", "best"] = "draw"
    rate: float = 1.0
    every: int = 1
    carry: float = 1.0
    seed: int = 0
    _last: Standing | None = field(default=None, init=False, repr=False)

    def forget(self) -> None:
        """Start over, as if nothing had been decoded."""
        self._last = None

    def start(self, batch: int, members: int) -> Standing:
        brought = [0.0] * members
        if self._last is not None:
            gained = [math.fsum(own) for own in zip(*self._last.own, strict=True)]
            brought = [self.carry * (b + g) for b, g in zip(self._last.brought, gained, strict=True)]
        self._last = Standing(brought, [[0.0] * members for _ in range(batch)], [[]] * batch)
        return self._last

    def weights(self, regrets: Sequence[float]) -> list[float]:
        """The mixture that these regrets ask for."""
        return normal_hedge(regrets) if self.scheme == "normal" else hedge(regrets, self.rate)

    def learn(self, memory: Standing, seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        if not memory.rounds:
            memory.names = [seeding.key("prompt", *row[:-1]) for row in committed]
            return
        if (memory.rounds - 1) % self.every:
            # Others may have read by chance, for a sequence of the batch that they draft for: that is nobody's lesson.
            return
        losses = self.losses(seats, committed)
        for b, row in enumerate(committed):
            if row:
                own = [member[b] for member in losses]
                memory.own[b] = updated(memory.own[b], memory.played[b], own)

    def choose(self, memory: Standing, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        memory.rounds += 1
        if (memory.rounds - 1) % self.every:
            return list(chosen)
        for seat in seats:
            seat.read()
        picked = list(chosen)
        for b in live:
            memory.played[b] = self.weights(memory.regrets(b))
            picked[b] = self._picked(memory.played[b], memory.names[b], memory.rounds)
        return picked

    def losses(self, seats: Sequence[Seat], committed: Committed) -> list[list[float]]:
        """Each member's loss in each sequence, `[members][B]`, of a round that committed these tokens."""
        if self.feedback == "first":
            hits = [first_hits(seat, wide, committed) for seat, wide in zip(seats, self.children, strict=True)]
            return [[1 - (1 + bool(hit)) / 2 for hit in own] for own in hits]
        deepest = max(self.depths)
        found = []
        for seat, deep, wide in zip(seats, self.depths, self.children, strict=True):
            part: Any = seat.part
            steps = unrolled(part.drafter, seat.state.inner, seat.state.proposal, committed, deep, wide)
            found.append([1 - (1 + h) / (deepest + 1) for h in accepted_depths(steps, len(committed))])
        return found

    def _picked(self, weights: Sequence[float], name: int, turn: int) -> int:
        if self.pick == "best":
            return max(range(len(weights)), key=lambda i: (weights[i], -i))
        key = torch.tensor([seeding.key("route", self.seed, name, turn)])
        draw = float(seeding.uniform(key, 1))
        for member, weight in enumerate(weights):
            draw -= weight
            if draw < 0:
                return member
        return len(weights) - 1


def carries(composition: Composition) -> bool:
    """Whether what it decoded before changes how it drafts: requests then have an order."""
    rule = getattr(composition, "rule", None)
    return (isinstance(rule, HedgeRule) and rule.carry > 0) or any(map(carries, getattr(composition, "parts", ())))


def hedged(parts: Sequence[Single], **options: Any) -> Route:
    """Full-information routing over drafters; `options` are `HedgeRule`'s."""
    members: tuple[Composition, ...] = tuple(Single(Counted(p.drafter), p.growth, p.name) for p in parts)
    depths = tuple(int(getattr(p.growth, "depth", 1)) for p in parts)
    return Route(members, HedgeRule(depths, tuple(children_of(p) for p in parts), **options))
