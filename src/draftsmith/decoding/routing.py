"""Routing: in each round one member drafts for a sequence.

Who drafts is decided from what is committed and what drafters proposed after it, never from the tokens that the round
will verify: that keeps decoding lossless and lets a stored answer be replayed. Members that need not look do not: what
was committed waits for them (`Seat`) and is read in one pass when they are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.decoding.composition import (
    Composition,
    Hidden,
    Seat,
    names_of,
    offsets_of,
    seated,
    wants_of,
)
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.merging import owned
from draftsmith.decoding.tree import DraftTree
from draftsmith.target.protocol import FeatureSpec

Committed = list[list[int]]  # of each sequence, what was just committed


class Rule(Protocol):
    """How a route decides. `memory` is what it knows of one batch."""

    def start(self, batch: int, members: int) -> Any: ...

    def learn(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        """Look at what a round committed; the seats still stand before it. The first call brings the prompts and the
        first tokens, when nobody has been chosen."""
        ...

    def choose(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        """Who drafts next for each sequence. `live` sequences still grow; for the others anything does.

        A rule that compares the members' proposals lets their seats `read` first.
        """
        ...


@dataclass
class RouteState:
    """One batch: seats, the rule's memory, and who drafts next for each sequence."""

    seats: list[Seat]
    memory: Any
    chosen: list[int]


@dataclass(frozen=True)
class Route:
    """One of several members drafts for each sequence, as a rule decides after every round."""

    parts: tuple[Composition, ...]
    rule: Rule

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.parts)

    @property
    def wants(self) -> FeatureSpec:
        return wants_of(self.parts)

    @property
    def budget(self) -> int:
        return max(part.budget for part in self.parts)

    def start(self, batch: int, capacity: int) -> RouteState:
        return RouteState(seated(self.parts, batch, capacity), self.rule.start(batch, len(self.parts)), [0] * batch)

    def observe(self, state: RouteState, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        rows = tokens.tolist()
        self.rule.learn(state.memory, state.seats, state.chosen, [r[:n] for r, n in zip(rows, lengths, strict=True)])
        for seat in state.seats:
            seat.hear(tokens, hidden, lengths)
        live = [b for b, n in enumerate(lengths) if n]
        state.chosen = self.rule.choose(state.memory, state.seats, state.chosen, live)
        for member in {state.chosen[b] for b in live}:
            state.seats[member].read()

    def propose(self, state: RouteState, limits: Limits) -> DraftTree:
        asked = [b for b, room in enumerate(limits.room.tolist()) if room > 0] or [0]
        members = sorted({state.chosen[b] for b in asked})
        chosen = torch.tensor(state.chosen, device=limits.room.device)
        offsets = offsets_of(self.parts)
        trees = []
        for member in members:
            seat = state.seats[member]
            seat.read()
            # The other sequences' drafts would be thrown away: there is no room for them.
            room = limits.room.masked_fill(chosen != member, 0) if len(members) > 1 else limits.room
            trees.append(owned(seat.part.propose(seat.state, replace(limits, room=room)), offsets[member]))
        places = torch.tensor([members.index(m) if m in members else 0 for m in state.chosen])
        return rows_of(trees, places)


@dataclass(frozen=True)
class ConfidenceRoute:
    """TAPS' routing (2603.27027): all members draft, and in each sequence the tree whose nodes have the largest mean
    path probability is verified; of equals the first member's."""

    parts: tuple[Composition, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.parts)

    @property
    def wants(self) -> FeatureSpec:
        return wants_of(self.parts)

    @property
    def budget(self) -> int:
        return max(part.budget for part in self.parts)

    def start(self, batch: int, capacity: int) -> list[Any]:
        return [part.start(batch, capacity) for part in self.parts]

    def observe(self, state: list[Any], tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.observe(own, tokens, hidden, lengths)

    def propose(self, state: list[Any], limits: Limits) -> DraftTree:
        trees = [
            owned(part.propose(own, limits), first)
            for part, own, first in zip(self.parts, state, offsets_of(self.parts), strict=True)
        ]
        return rows_of(trees, torch.stack([confidence(tree) for tree in trees]).argmax(0))


def confidence(tree: DraftTree) -> Tensor:
    """Mean path probability over each tree's nodes, `[B]` float64; 0 for a tree without nodes."""
    probability = tree.log_q.double().exp().masked_fill(~tree.real, 0)
    return probability.sum(1) / tree.counts.clamp(min=1)


def entropy(log_q: Tensor) -> Tensor:
    """Entropy in nats, float64: `[..., Vd]` → `[...]`."""
    found: Tensor = torch.special.entr(log_q.double().exp()).sum(-1)
    return found


def rows_of(trees: Sequence[DraftTree], chosen: Tensor) -> DraftTree:
    """In each row b the tree `trees[chosen[b]]`; all are of the same batch."""
    if len(trees) == 1:
        return trees[0]
    device = trees[0].tokens.device
    chosen = chosen.to(device)
    row = torch.arange(len(chosen), device=device)
    counts = torch.stack([tree.counts for tree in trees])[chosen, row]
    width = int(counts.max()) if len(chosen) else 0

    def column(name: str, fill: float) -> Tensor:
        values = [getattr(tree, name)[:, :width] for tree in trees]
        padded = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
        return torch.stack(padded)[chosen, row]

    return DraftTree(
        column("tokens", 0),
        column("parents", -1),
        column("depths", 1),
        column("log_q", -torch.inf),
        column("owner", 0),
        counts,
    )


@dataclass
class _Probed:
    total: Tensor  # [members, B] entropy so far
    rounds: int = 0


@dataclass(frozen=True)
class EntropyRule:
    """Per prompt: the member whose distribution is sharpest there drafts the whole answer (TAPS, `gen_routing_eval`).

    Attributes:
        rounds: over how many rounds the entropies are averaged before the choice is kept; all members read meanwhile.
    """

    rounds: int = 1

    def start(self, batch: int, members: int) -> _Probed:
        return _Probed(torch.zeros((members, batch), dtype=torch.float64))

    def learn(self, memory: _Probed, seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        pass

    def choose(self, memory: _Probed, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        if memory.rounds >= self.rounds:
            return list(chosen)
        for seat in seats:
            seat.read()
        memory.rounds += 1
        memory.total += torch.stack([entropy(proposed(seat)[:, 0]) for seat in seats]).cpu()
        found: list[int] = memory.total.argmin(0).tolist()
        return found


@dataclass(frozen=True)
class KeywordRule:
    """Per prompt: the first member one of whose words stands in the prompt's text, else the default.

    Attributes:
        words: of each member, what calls it: whole words, upper and lower case alike.
        default: the member for prompts without any.
        text: how token ids become text.
    """

    words: tuple[tuple[str, ...], ...]
    default: int
    text: Callable[[Sequence[int]], str]

    def start(self, batch: int, members: int) -> list[int]:
        return []

    def learn(self, memory: list[int], seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        if not memory:
            # What comes first is the prompt and one token of the answer.
            memory += [self._called(self.text(row[:-1])) for row in committed]

    def choose(self, memory: list[int], seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        return list(memory)

    def _called(self, prompt: str) -> int:
        for member, words in enumerate(self.words):
            if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) for word in words):
                return member
        return self.default


def proposed(seat: Seat) -> Tensor:
    """The proposal `[B, 1, Vd]` of a drafter that has caught up."""
    found = seat.proposal
    assert found is not None, "a rule that looks at proposals lets the seats read first, and its members are drafters"
    return found.log_q


def first_hits(seat: Seat, children: int, committed: Committed) -> list[bool | None]:
    """Whether the first committed token of each sequence was among the member's `children` likeliest; None: nothing
    was committed."""
    log_q = proposed(seat)[:, 0]
    best = log_q.topk(min(children, log_q.shape[1]), dim=-1)
    drafter: Any = seat.part
    ids = drafter.drafter.vocab.to_target(best.indices).masked_fill(best.values == -torch.inf, -1).tolist()
    return [row[0] in own if row else None for row, own in zip(committed, ids, strict=True)]
