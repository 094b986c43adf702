"""When a chain stops: AdaEDL's entropy bound (2410.18351) and the threshold that follows each sequence's acceptance."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EntropyStop:
    """The rule's constants.

    Attributes:
        gamma: γ of the bound.
        start: λ, below which drafting stops, before anything was accepted or rejected.
        goal: the acceptance rate that λ steers to.
        smoothing: β, the weight of the past in the running acceptance rate.
        step: by how much λ moves in a round.
    """

    gamma: float = 0.2
    start: float = 0.5
    goal: float = 0.8
    smoothing: float = 0.5
    step: float = 0.01


@dataclass(frozen=True)
class Thresholds:
    """What is known of each sequence, all `[B]`: λ and the running acceptance rate (float64), and the last round's
    drafted nodes and room (int64), from which the next round sees what was accepted."""

    value: Tensor
    rate: Tensor
    drafted: Tensor
    room: Tensor


def acceptance_bound(log_q: Tensor, gamma: float) -> Tensor:
    """1 − sqrt(γ · H(q)), the least acceptance of a token drafted from q: `[..., Vd]` → `[...]`, float64."""
    entropy: Tensor = torch.special.entr(log_q.double().exp()).sum(-1)  # nats
    return 1 - (gamma * entropy).sqrt()


def fresh(room: Tensor, stop: EntropyStop) -> Thresholds:
    """Before the first round: nothing drafted yet."""
    value = torch.full(room.shape, stop.start, dtype=torch.float64, device=room.device)
    return Thresholds(value, torch.full_like(value, stop.goal), torch.zeros_like(room), room)


def committed(before: Thresholds, room: Tensor, stop: EntropyStop) -> Thresholds:
    """The thresholds after the last round, told from how much room it took.

    A round that accepted a of d > 0 drafted tokens took a + 1 of the room (the bonus token included). Then

        r ← β · r + (1 − β) · a / d,    λ ← clamp(λ + step if r < goal else λ − step, 0, 1):

    where too little is accepted, chains get shorter. AdaEDL does not print its update; this is the shape of Draft &
    Verify's for its exit threshold (2309.08168). Rounds that drafted nothing or committed nothing change nothing.
    """
    written = before.room - room
    happened = (written > 0) & (before.drafted > 0)
    accepted = torch.minimum(written - 1, before.drafted)
    share = accepted.double() / before.drafted.clamp(min=1)
    rate = torch.where(happened, stop.smoothing * before.rate + (1 - stop.smoothing) * share, before.rate)
    moved = before.value + torch.where(rate < stop.goal, stop.step, -stop.step)
    value = torch.where(happened, moved.clamp(0, 1), before.value)
    return Thresholds(value, rate, before.drafted, room)


class Remembered:
    """Thresholds of each batch in progress, found by the drafter's state of that batch and forgotten with it.

    A growth is one value for all batches; the state that its caller hands over in every round is what tells them apart.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Any], Thresholds]] = {}

    def of(self, state: Any) -> Thresholds | None:
        found = self._kept.get(id(state))
        return found[1] if found else None

    def keep(self, state: Any, thresholds: Thresholds) -> None:
        key = id(state)
        # Its callback runs before the id can be given to another object.
        self._kept[key] = (weakref.ref(state, lambda _: self._kept.pop(key, None)), thresholds)

    def __len__(self) -> int:
        return len(self._kept)
