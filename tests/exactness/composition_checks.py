"""Checks of members put together: the composition tests call them, and the planted faults must make them fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.building import build
from draftsmith.decoding.composition import Composition, Seat, Single, seated
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth, Limits
from draftsmith.decoding.hedging import HedgeRule, hedged, normal_hedge
from draftsmith.decoding.routing import Route
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter
from draftsmith.target.protocol import FeatureSpec, Layer
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from tests.exactness.checks import _close as close
from tests.exactness.checks import _piece as piece
from tests.exactness.members import oracles
from tests.tiny import END, OracleDrafter, tiny_target


def a_seat_that_catches_up_proposes_the_same(
    drafter: Drafter, tolerance: float, texts: Sequence[Sequence[int]] | None = None
) -> None:
    """One seat reads every round and drafts in between, the other waits for several and reads them in one pass."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.tensor(texts) if texts else torch.randint(8, 90, (3, 60), generator=generator)
    states = {layer: torch.randn(3, 60, 32, generator=generator) for layer in drafter.wants.names}
    single = Single(drafter, DynamicGrowth(9, 3, 3))
    prompt, idle = seated([single, single], 3, 96)
    done = [0, 0, 0]
    limits = Limits(torch.tensor([9, 9, 9]), torch.tensor([END]))
    for turn, counts in enumerate(([6, 9, 4], [1, 3, 2], [4, 1, 0], [2, 2, 5], [1, 1, 1], [3, 4, 2])):
        longest = max(counts)
        pieces = torch.stack([piece(tokens[b], done[b], longest) for b in range(3)])
        own = {k: torch.stack([piece(s[b], done[b], longest) for b in range(3)]) for k, s in states.items()}
        for seat in (prompt, idle):
            seat.hear(pieces, own, counts)
        prompt.read()
        ours = prompt.part.propose(prompt.state, limits)
        done = [d + n for d, n in zip(done, counts, strict=True)]
        if turn in (2, 5):
            idle.read()
            assert prompt.proposal is not None
            assert idle.proposal is not None
            close(idle.proposal.log_q, prompt.proposal.log_q, tolerance, f"proposal after round {turn}")
            theirs = idle.part.propose(idle.state, limits)
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.parents, theirs.parents)
            close(theirs.log_q, ours.log_q, tolerance, f"tree after round {turn}")
            # committed text goes on although the trees were other members'
            prompt.part.propose(prompt.state, limits)


class RouteRecorder:
    """A hedging rule, watched: who was chosen for each round, and the losses of each."""

    def __init__(self, rule: HedgeRule) -> None:
        self.rule = rule
        self.chosen: list[list[int]] = []
        self.losses: list[list[list[float]]] = []

    def start(self, batch: int, members: int) -> Any:
        return self.rule.start(batch, members)

    def learn(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], committed: Any) -> None:
        if memory.rounds:
            self.losses.append(self.rule.losses(seats, committed))
        self.rule.learn(memory, seats, chosen, committed)

    def choose(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        self.chosen.append(self.rule.choose(memory, seats, chosen, live))
        return self.chosen[-1]


def _routed(texts: Sequence[Sequence[int]], feedback: str) -> tuple[RouteRecorder, list[Generation]]:
    """A replay of these texts with two oracles under a watched rule that takes the heaviest."""
    members = [
        Single(OracleDrafter(texts, d, seed=i), DynamicGrowth(8, 3, 3), str(d)) for i, d in enumerate((0.4, 0.7))
    ]
    route = hedged(members, feedback=feedback, pick="best")
    assert isinstance(route.rule, HedgeRule)
    watched = RouteRecorder(route.rule)
    answers = [StoredAnswer(t, 6, {}, False) for t in texts]
    engine = Engine(ReplayTarget(tiny_target("llama").spec, answers), Route(route.parts, watched))
    return watched, engine.generate([t[:6] for t in texts], None, len(texts[0]) - 6)


def losses_are_of_the_proposals_before(feedback: str) -> None:
    """Each round's losses are those of each member's own trees at that round's root, drafted here anew."""
    texts = [[10 + (7 * i * i + 3 * b * i) % 80 for i in range(60)] for b in range(2)]
    watched, found = _routed(texts, feedback)
    for b in range(2):
        assert len(watched.losses) >= len(found[b].rounds) - 1 > 8
        for turn, r in enumerate(found[b].rounds[:-1]):
            committed = texts[b][r.context : r.context + r.kept]
            for i, dial in enumerate((0.4, 0.7)):
                oracle = OracleDrafter(texts, dial, seed=i)
                hits = 0
                for depth, token in enumerate(committed[: 3 if feedback == "path" else 1], start=1):
                    likeliest = oracle._row(b, r.context + depth - 1, True).topk(3).indices.tolist()
                    if token not in likeliest:
                        break
                    hits += 1
                deepest = 3 if feedback == "path" else 1
                assert watched.losses[turn][i][b] == 1 - (1 + hits) / (deepest + 1), f"round {turn}, member {dial}"


def a_choice_knows_only_rounds_before_it() -> None:
    """Two texts that part at some place: until the round that meets the difference, and in it, the choices agree; and
    they are those of weights told anew from the losses of earlier rounds."""
    base = [10 + (7 * i * i) % 80 for i in range(70)]
    other = [*base[:30], *((token - 10 + 41) % 80 + 10 for token in base[30:])]
    for feedback in ("first", "path"):
        runs = [_routed([text], feedback) for text in (base, other)]
        for watched, found in runs:
            regrets = [0.0, 0.0]
            for turn, (chosen, losses) in enumerate(zip(watched.chosen, watched.losses, strict=False)):
                weights = normal_hedge(regrets)
                assert chosen == [0 if weights[0] >= weights[1] else 1], f"round {turn} of {len(found[0].rounds)}"
                mixture = weights[0] * losses[0][0] + weights[1] * losses[1][0]
                regrets = [regrets[i] + mixture - losses[i][0] for i in range(2)]
        met = next(i for i, r in enumerate(runs[0][1][0].rounds) if r.context + r.kept > 30)
        assert met > 4
        assert runs[0][0].chosen[: met + 1] == runs[1][0].chosen[: met + 1]
        assert {c[0] for c in runs[0][0].chosen} == {0, 1}


@dataclass
class Watched:
    """A composition that hands out its trees as they are and keeps them."""

    inner: Composition
    trees: list[DraftTree] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return self.inner.names

    @property
    def wants(self) -> FeatureSpec:
        return self.inner.wants

    @property
    def budget(self) -> int:
        return self.inner.budget

    def start(self, batch: int, capacity: int) -> Any:
        return self.inner.start(batch, capacity)

    def observe(self, state: Any, tokens: Tensor, hidden: Mapping[Layer, Tensor], lengths: Sequence[int]) -> None:
        self.inner.observe(state, tokens, hidden, lengths)

    def propose(self, state: Any, limits: Limits) -> DraftTree:
        self.trees.append(self.inner.propose(state, limits))
        return self.trees[-1]


def owners_are_who_proposed(spec: str) -> None:
    """Every node's owner had its token among the likeliest below the node's parent, and others often had not."""
    text = [10 + (7 * i * i + 5 * i) % 80 for i in range(70)]
    composition = Watched(build(spec, oracles([text]), DynamicGrowth(8, 3, 3)))
    answer = StoredAnswer(text, 6, {}, False)
    found = Engine(ReplayTarget(tiny_target("llama").spec, [answer]), composition).generate([text[:6]], None, 64)[0]
    members = {i: oracles([text])[name].drafter for i, name in enumerate(composition.names)}
    seen: set[int] = set()
    alone = 0
    for tree, r in zip(composition.trees, found.rounds, strict=True):
        tokens, parents, owners = tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.owner[0].tolist()
        for node in range(int(tree.counts)):
            above: list[int] = []
            at = parents[node]
            while at >= 0:
                above.insert(0, tokens[at])
                at = parents[at]
            right = above == text[r.context : r.context + len(above)]
            had = set()
            for i, member in members.items():
                assert isinstance(member, OracleDrafter)
                row = member._row(0, r.context + len(above), right)
                if tokens[node] in row.topk(3).indices.tolist():
                    had.add(i)
            assert owners[node] in had, f"{composition.names[owners[node]]} never proposed node {node} at {r.context}"
            seen.add(owners[node])
            alone += len(had) == 1
    assert seen == set(members)
    assert alone > 20


def a_trie_holds_nothing_twice() -> None:
    """No two nodes of a trie are one path, and its budget is used up where members draft enough."""
    text = [10 + (7 * i * i + 5 * i) % 80 for i in range(70)]
    composition = Watched(build("merge:trie(half,sure,poor,budget=8)", oracles([text]), DynamicGrowth(8, 3, 3)))
    answer = StoredAnswer(text, 6, {}, False)
    Engine(ReplayTarget(tiny_target("llama").spec, [answer]), composition).generate([text[:6]], None, 64)
    sizes = []
    for tree in composition.trees:
        known: dict[int, tuple[int, ...]] = {-1: ()}
        for node in range(int(tree.counts)):
            known[node] = (*known[int(tree.parents[0, node])], int(tree.tokens[0, node]))
        assert len(set(known.values())) == len(known), "a path stands in the trie twice"
        sizes.append(int(tree.counts))
    assert max(sizes) == 8
    assert len(sizes) > 8
