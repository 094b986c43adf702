"""Faults of members put together, planted one at a time; a check that the suite makes must notice each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from draftsmith.decoding import hedging, merging, routing
from draftsmith.decoding.composition import Seat
from draftsmith.decoding.hedging import HedgeRule, normal_hedge
from draftsmith.decoding.routing import Route
from draftsmith.decoding.tree import DraftTree, pruned
from draftsmith.target.sampling import Sampling
from tests.exactness.composition_checks import (
    a_choice_knows_only_rounds_before_it,
    a_seat_that_catches_up_proposes_the_same,
    a_trie_holds_nothing_twice,
    losses_are_of_the_proposals_before,
    owners_are_who_proposed,
)
from tests.exactness.members import composed_equals_plain
from tests.tiny import tiny_head

Patch = pytest.MonkeyPatch


def an_unchosen_member_does_not_catch_up(patch: Patch) -> None:
    read = Seat.read

    def planted(seat: Seat) -> None:
        if seat.proposal is None and len(seat.waiting) > 1 and seat.waiting[0][0].shape[1] < 6:
            del seat.waiting[:-1]
        read(seat)

    patch.setattr(Seat, "read", planted)


def only_the_last_round_is_read(patch: Patch) -> None:
    read = Seat.read

    def planted(seat: Seat) -> None:
        if len(seat.waiting) > 2:
            del seat.waiting[1:-1]
        read(seat)

    patch.setattr(Seat, "read", planted)


def owners_are_not_renumbered(patch: Patch) -> None:
    for module in (merging, routing):
        patch.setattr(module, "owned", lambda tree, first: tree)


def owners_are_reversed(patch: Patch) -> None:
    owned = merging.owned
    for module in (merging, routing):
        patch.setattr(module, "owned", lambda tree, first: owned(tree, 1 - first))


def equal_siblings_stay(patch: Patch) -> None:
    def planted(trees: Sequence[DraftTree], budget: int, room: Tensor | None = None) -> DraftTree:
        return pruned(merging.concatenated(trees), budget, room)

    patch.setattr(merging, "merged", planted)


def members_read_before_they_are_judged(patch: Patch) -> None:
    def planted(route: Route, state: Any, tokens: Tensor, hidden: Any, lengths: Sequence[int]) -> None:
        for seat in state.seats:
            seat.hear(tokens, hidden, lengths)
            seat.read()
        committed = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        route.rule.learn(state.memory, state.seats, state.chosen, committed)
        live = [b for b, n in enumerate(lengths) if n]
        state.chosen = route.rule.choose(state.memory, state.seats, state.chosen, live)

    patch.setattr(Route, "observe", planted)


def the_mixture_is_charged_by_weights_that_know(patch: Patch) -> None:
    updated = hedging.updated

    def planted(regrets: Sequence[float], played: Sequence[float], losses: Sequence[float]) -> list[float]:
        return updated(regrets, normal_hedge(updated(regrets, played, losses)), losses)

    patch.setattr(hedging, "updated", planted)


def the_choice_is_made_by_the_rounds_own_outcome(patch: Patch) -> None:
    """Weights move by the token that the round is about to commit (the oracles know it) before the choice is made."""
    choose = HedgeRule.choose

    def planted(rule: HedgeRule, memory: Any, seats: Any, chosen: Any, live: Sequence[int]) -> list[int]:
        for seat in seats:
            seat.read()
        coming = []
        for b in range(len(chosen)):
            oracle, state = seats[0].part.drafter.drafter, seats[0].state.inner.inner
            coming.append(oracle.texts[b][state.committed[b] :][:1] if b in live else [])
        own = [list(regrets) for regrets in memory.own]
        for b, losses in enumerate(zip(*rule.losses(seats, coming), strict=True)):
            memory.own[b] = [r - 2 * loss for r, loss in zip(own[b], losses, strict=True)]
        picked = choose(rule, memory, seats, chosen, live)
        memory.own = own
        return picked

    patch.setattr(HedgeRule, "choose", planted)


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Patch], None]
    check: Callable[[], object]


def equality(name: str, batch: int = 2) -> Callable[[], object]:
    return lambda: composed_equals_plain(name, Sampling(temperature=0.7, seed=2), batch)


FAULTS = [
    Fault(an_unchosen_member_does_not_catch_up, equality("hedge-seldom")),
    Fault(only_the_last_round_is_read, equality("hedge-seldom")),
    Fault(only_the_last_round_is_read, lambda: a_seat_that_catches_up_proposes_the_same(tiny_head(), 1e-5)),
    Fault(owners_are_not_renumbered, lambda: owners_are_who_proposed("merge:trie(poor,sure)")),
    Fault(owners_are_not_renumbered, lambda: owners_are_who_proposed("route:confidence(poor,half)")),
    Fault(owners_are_reversed, lambda: owners_are_who_proposed("merge:concat(poor,sure)")),
    Fault(owners_are_reversed, lambda: owners_are_who_proposed("route:hedge(poor,sure)")),
    Fault(equal_siblings_stay, a_trie_holds_nothing_twice),
    Fault(members_read_before_they_are_judged, lambda: losses_are_of_the_proposals_before("first")),
    Fault(members_read_before_they_are_judged, lambda: losses_are_of_the_proposals_before("path")),
    Fault(the_mixture_is_charged_by_weights_that_know, a_choice_knows_only_rounds_before_it),
    Fault(the_choice_is_made_by_the_rounds_own_outcome, a_choice_knows_only_rounds_before_it),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_noticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.check()
    with monkeypatch.context() as patch:
        fault.plant(patch)
        with pytest.raises(AssertionError):
            fault.check()
