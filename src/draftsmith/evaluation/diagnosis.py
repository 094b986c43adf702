"""Node by node: who drafted it, how sure it was, and what the target made of it. For reports, not for timing.

A composition is watched from outside: its drafters' distributions and its trees are written down as they come, and told
apart afterwards by the text that was committed. Decoding and replay are watched alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from draftsmith.decoding.composition import Composition, Hidden, Single
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.hindsight import Counted
from draftsmith.decoding.routing import entropy
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

Outcome = Literal["accepted", "refused", "untested"]
Path = tuple[int, ...]


@dataclass(frozen=True)
class NodeRow:
    """One verified node.

    Attributes:
        request, round: which sequence, and the number of its round.
        owner: the drafter's number.
        depth: 1 for the root's children.
        confidence: probability of the path to it, as its drafter sees it.
        entropy: nats of the distribution that it was taken from.
        outcome: accepted; refused: the target stood at its parent and wrote something else; untested: its parent was
            not accepted.
    """

    request: int
    round: int
    owner: int
    depth: int
    confidence: float
    entropy: float
    outcome: Outcome


@dataclass
class _Seen:
    inner: Any
    known: list[dict[Path, float]] = field(default_factory=list)  # entropy after each path, of each sequence
    paths: list[list[Path]] = field(default_factory=list)  # of the nodes expanded, in order


class _Watched:
    """A drafter whose distributions' entropies are written down."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.latest: _Seen | None = None

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def vocab(self) -> VocabMap:
        return self.drafter.vocab

    def start(self, batch: int, capacity: int) -> _Seen:
        self.latest = _Seen(self.drafter.start(batch, capacity))
        return self.latest

    def observe(self, state: _Seen, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        proposal = self.drafter.observe(state.inner, tokens, features, lengths)
        state.known = [{(): value} for value in entropy(proposal.log_q[:, 0]).tolist()]
        state.paths = [[] for _ in lengths]
        return proposal

    def expand(self, state: _Seen, frontier: Frontier) -> Proposal:
        proposal = self.drafter.expand(state.inner, frontier)
        values = entropy(proposal.log_q).tolist()
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            above = [state.paths[b][p] if p >= 0 else () for p in parents]
            new = [(*path, token) for path, token in zip(above, tokens, strict=True)]
            state.paths[b] += new
            state.known[b] |= dict(zip(new, values[b], strict=True))
        return proposal


@dataclass
class _Drafted:
    path: Path
    owner: int
    confidence: float
    entropy: float


class Recorder:
    """A composition, watched: it drafts what it would, and `rows` tells what became of it."""

    def __init__(self, composition: Composition) -> None:
        self._watchers: list[_Watched] = []
        self.inner = self._watched(composition)
        self._rounds: list[list[list[_Drafted]]] = []  # of each round, of each sequence

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
        self._rounds = []
        return self.inner.start(batch, capacity)

    def observe(self, state: Any, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        self.inner.observe(state, tokens, hidden, lengths)

    def propose(self, state: Any, limits: Limits) -> DraftTree:
        tree = self.inner.propose(state, limits)
        self._rounds.append([list(self._drafted(tree, b)) for b in range(tree.batch)])
        return tree

    def rows(self, generations: Sequence[Generation], prompts: Sequence[Sequence[int]]) -> list[NodeRow]:
        """What became of the nodes of the last batch, given its answers."""
        found = []
        for generation, prompt in zip(generations, prompts, strict=True):
            text = [*prompt, *generation.token_ids]
            for number, told in enumerate(generation.rounds):
                for node in self._rounds[number][generation.request]:
                    depth = len(node.path)
                    on_path = node.path[:-1] == tuple(text[told.context : told.context + depth - 1])
                    outcome: Outcome = "untested"
                    if on_path and depth <= told.accepted and node.path[-1] == text[told.context + depth - 1]:
                        outcome = "accepted"
                    elif on_path and depth <= told.accepted + 1:
                        outcome = "refused"
                    found.append(
                        NodeRow(generation.request, number, node.owner, depth, node.confidence, node.entropy, outcome)
                    )
        return found

    def _watched(self, composition: Composition) -> Composition:
        if isinstance(composition, Single):
            counted = isinstance(composition.drafter, Counted)
            watcher = _Watched(composition.drafter.drafter if counted else composition.drafter)  # type: ignore[attr-defined]
            self._watchers.append(watcher)
            return replace(composition, drafter=Counted(watcher) if counted else watcher)
        made: Any = composition
        return replace(made, parts=tuple(self._watched(part) for part in made.parts))  # type: ignore[no-any-return]

    def _drafted(self, tree: DraftTree, b: int) -> Iterator[_Drafted]:
        paths: list[Path] = []
        columns = (tree.tokens[b], tree.parents[b], tree.owner[b], tree.log_q[b].double().exp())
        count = int(tree.counts[b])
        for token, parent, owner, confidence in zip(*(c[:count].tolist() for c in columns), strict=True):
            above = paths[parent] if parent >= 0 else ()
            paths.append((*above, token))
            seen = self._watchers[owner].latest
            assert seen is not None
            yield _Drafted(paths[-1], owner, confidence, seen.known[b][above])


@dataclass(frozen=True)
class OwnerSummary:
    """A drafter's nodes of one depth.

    Attributes:
        nodes: verified, tested (the target stood at the parent), accepted.
        confidence, entropy: means over its accepted and its refused nodes; NaN where there was none.
    """

    owner: int
    depth: int
    nodes: tuple[int, int, int]
    confidence: tuple[float, float]
    entropy: tuple[float, float]


def by_owner_and_depth(rows: Sequence[NodeRow]) -> list[OwnerSummary]:
    """How sure each drafter was of what was accepted and of what was refused, by depth."""
    groups: dict[tuple[int, int], list[NodeRow]] = {}
    for row in rows:
        groups.setdefault((row.owner, row.depth), []).append(row)
    found = []
    for (owner, depth), own in sorted(groups.items()):
        split: Mapping[str, list[NodeRow]] = {o: [r for r in own if r.outcome == o] for o in ("accepted", "refused")}
        accepted, refused = split["accepted"], split["refused"]
        found.append(
            OwnerSummary(
                owner,
                depth,
                (len(own), len(accepted) + len(refused), len(accepted)),
                (_mean([r.confidence for r in accepted]), _mean([r.confidence for r in refused])),
                (_mean([r.entropy for r in accepted]), _mean([r.entropy for r in refused])),
            )
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
