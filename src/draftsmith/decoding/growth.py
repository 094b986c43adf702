"""Growth policies: how one drafter's proposals become a draft tree.

All policies but `sampled` (`drawn.py`) are deterministic given the drafter's proposals, and what decides a tree's shape
looks only at what is committed or drafted: that is what lets the verifier draw the target's token first and look
whether it is in the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from draftsmith.decoding.costs import (
    affordable,
    at_contexts,
    pays,
    stored_contexts,
    stored_pass_ms,
    stored_round_costs,
)
from draftsmith.decoding.drafting import Limits as Limits
from draftsmith.decoding.drafting import drafted, dynamic, tree_of
from draftsmith.decoding.drawn import SampledGrowth
from draftsmith.decoding.shapes import STATIC_15, Level, Paths, checked, levels
from draftsmith.decoding.stopping import EntropyStop, Remembered, acceptance_bound, committed, fresh
from draftsmith.decoding.tree import DraftTree, pruned
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.foundation.options import Options


class Growth(Protocol):
    """Grows the batch's trees from a drafter whose state has just observed the committed tokens."""

    @property
    def budget(self) -> int:
        """Nodes of a tree at most (the root is none)."""
        ...

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        """Trees from what `observe` gave (`log_q [B, 1, Vd]`) and what `expand` adds."""
        ...


# Which kind each later option belongs to; the first four belong to all.
_OWN = {
    "paths": "static",
    "least_mass": "dynamic",
    **dict.fromkeys(("gamma", "threshold", "goal", "smoothing", "step"), "adaedl"),
    **dict.fromkeys(("profile", "drafter", "draft_ms", "sequences"), "cost-aware"),
    **dict.fromkeys(("branches", "replacement"), "sampled"),
}


class GrowthOptions(Options):
    """Which growth, and how large."""

    kind: Literal["dynamic", "chain", "static", "best-first", "adaedl", "cost-aware", "sampled"] = Field(
        default="dynamic",
        description="dynamic: EAGLE-2's tree; chain: one token after another; static: always the same shape; "
        "best-first: the likeliest nodes wherever they stand; adaedl: a chain that stops where the drafter is unsure; "
        "cost-aware: dynamic, with as many nodes as pay for their verification; sampled: drawn from the drafter's "
        "distribution in a fixed shape, for the verification rules token and block",
    )
    node_budget: int = Field(
        default=15, ge=1, description="drafted nodes verified in a round, root not counted (cost-aware: at most)"
    )
    depth: int = Field(default=4, ge=1, description="deepest node; a chain has as many nodes (adaedl: at most)")
    width: int = Field(
        default=4,
        ge=1,
        description="nodes expanded at each depth and children taken of each (dynamic, cost-aware); children taken of "
        "each (best-first)",
    )
    least_mass: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="no deeper where the path probabilities of the nodes to expand sum up to less (dynamic)",
    )
    paths: Paths = Field(default=STATIC_15, description="nodes as ranks of children from the root down (static)")
    gamma: float = Field(default=0.2, gt=0, description="weight of the entropy in the acceptance bound (adaedl)")
    threshold: float = Field(default=0.5, ge=0, le=1, description="bound below which a chain stops, at first (adaedl)")
    goal: float = Field(default=0.8, ge=0, le=1, description="acceptance rate that the threshold steers to (adaedl)")
    smoothing: float = Field(default=0.5, ge=0, lt=1, description="weight of the past in that rate (adaedl)")
    step: float = Field(default=0.01, ge=0, le=1, description="how far the threshold moves in a round (adaedl)")
    profile: Path | None = Field(
        default=None, description="costs stored by draftsmith profile or by tune: profile.json (cost-aware)"
    )
    drafter: str | None = Field(default=None, description="who drafts, where the profile knows several (cost-aware)")
    draft_ms: float | None = Field(
        default=None, ge=0, description="milliseconds of drafting a round, instead of the profile's (cost-aware)"
    )
    sequences: int = Field(default=1, ge=1, description="sequences decoded together, in one pass (cost-aware)")
    branches: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 1, 1, 1),
        min_length=1,
        description="candidates drawn below the root, below each of these, …; ones make a chain (sampled)",
    )
    replacement: bool = Field(
        default=False, description="draw a node's candidates independently, so that some may be equal (sampled)"
    )

    @field_validator("paths")
    @classmethod
    def _whole(cls, paths: Paths) -> Paths:
        return checked(paths)

    @model_validator(mode="after")
    def _has_costs(self) -> GrowthOptions:
        if self.kind == "cost-aware" and self.profile is None:
            raise ValueError("a cost-aware growth needs a profile: what draftsmith profile or tune wrote")
        return self

    @model_serializer(mode="wrap")
    def _without_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What another kind reads changes no result and is in no fingerprint.
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if _OWN.get(name, self.kind) == self.kind}

    def build(self) -> Growth:
        """The growth that these options describe. UserError: a cost-aware growth's profile has no usable costs."""
        match self.kind:
            case "chain":
                return ChainGrowth(self.depth)
            case "static":
                return StaticGrowth(self.paths)
            case "best-first":
                return BestFirstGrowth(self.node_budget, self.depth, self.width)
            case "adaedl":
                stop = EntropyStop(self.gamma, self.threshold, self.goal, self.smoothing, self.step)
                return AdaEDLGrowth(self.depth, stop)
            case "sampled":
                return SampledGrowth(self.branches, self.replacement)
            case "cost-aware":
                assert self.profile is not None
                given = (self.profile, self.node_budget, self.depth, self.width, self.draft_ms, self.sequences)
                contexts = stored_contexts(self.profile)
                table = tuple(stored_round_costs(*given, c, self.drafter) for c in contexts or (None,))
                shape = (self.depth, self.width)
                known = self.draft_ms is None
                deeper = stored_pass_ms(self.profile, *shape, self.sequences, self.drafter) if known else 0.0
                return CostAwareGrowth(table[0], *shape, contexts, table if contexts else (), deeper)
        return DynamicGrowth(self.node_budget, self.depth, self.width, self.least_mass)


@dataclass(frozen=True)
class ChainGrowth:
    """The likeliest token, then the likeliest after it, and so on: what servers without trees do."""

    depth: int

    @property
    def budget(self) -> int:
        return self.depth

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        tree = drafted(drafter, state, proposal, self.depth, 1, limits, lambda level, pool: 1)
        return pruned(tree, self.depth, limits.room)


@dataclass(frozen=True)
class DynamicGrowth:
    """EAGLE-2 (2406.16858, §4): expand the `width` nodes of largest path probability of each depth, `width` children
    each, then keep the `budget` nodes of largest path probability V = Π q along the path; of equals the shallower.

    With `least_mass` a depth is drafted only where that promises something: V of the nodes to expand sums up to it. A
    draft pass that adds less to the expected tokens than its share of a round's time is not worth making.
    """

    budget: int
    depth: int
    width: int
    least_mass: float = 0.0

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        def worth(frontier: Tensor, pool: Tensor, level: int) -> Tensor:
            return frontier.exp().sum(1) >= self.least_mass

        tree = dynamic(drafter, state, proposal, self.depth, self.width, limits, worth if self.least_mass else None)
        return pruned(tree, self.budget, limits.room)


@dataclass(frozen=True)
class StaticGrowth:
    """A fixed shape (Medusa, 2401.10774): node (0, 2) is the third likeliest child of the likeliest first token."""

    paths: Paths = STATIC_15

    @property
    def budget(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        return len(self._levels)

    @cached_property
    def _levels(self) -> list[Level]:
        return levels(self.paths)

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        log_q = proposal.log_q
        batch, _, vocab = log_q.shape
        device = log_q.device
        deepest = min(self.depth, int(limits.room.max()) if batch else 0)
        above = torch.zeros((batch, 1), device=device)
        tokens, parents, scores = [], [], []
        for depth, level in enumerate(self._levels[: max(deepest, 1)], start=1):
            reach = min(max(level.ranks) + 1, vocab)
            values, ids = log_q.topk(reach, dim=-1)
            slots = torch.tensor(level.slots, device=device)
            ranks = torch.tensor(level.ranks, device=device)
            path = above[:, slots] + values[:, slots, ranks.clamp(max=reach - 1)]
            scores.append(path.masked_fill(ranks >= reach, -torch.inf))
            tokens.append(drafter.vocab.to_target(ids[:, slots, ranks.clamp(max=reach - 1)]))
            parents.append(torch.tensor(level.parents, device=device).expand(batch, -1))
            if depth < deepest:
                frontier = tokens[-1][:, level.inner]
                ended = torch.isin(frontier, limits.ends)
                above = scores[-1][:, level.inner].masked_fill(ended, -torch.inf)
                places = torch.tensor(level.parent_slots, device=device).expand(batch, -1)
                log_q = drafter.expand(state, Frontier(frontier, places, depth)).log_q
        return pruned(tree_of(tokens, parents, scores), self.budget, limits.room)


@dataclass(frozen=True)
class BestFirstGrowth:
    """Take the likeliest node that is known and learn its children, until `budget` nodes are taken.

    That is the `budget` nodes of largest path probability among all to `depth`, `width` children each. Taken literally
    it costs `budget` − 1 draft passes of one node. Here a whole depth is expanded at once: its nodes that are among
    the `budget` likeliest known so far. Others cannot be taken, nor what stands below them, so the tree is the same,
    in at most `depth` − 1 passes of at most `budget` nodes.
    """

    budget: int
    depth: int
    width: int

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        def promising(level: Tensor, pool: Tensor) -> int:
            least = pool.topk(min(self.budget, pool.shape[1]), dim=1).values[:, -1:]
            taken = ((level >= least) & (level > -torch.inf)).sum(1)
            return min(int(taken.max()), self.budget) if len(level) else 0

        tree = drafted(drafter, state, proposal, self.depth, self.width, limits, promising)
        return pruned(tree, self.budget, limits.room)


@dataclass(frozen=True)
class AdaEDLGrowth:
    """AdaEDL (2410.18351): a chain of the likeliest tokens that stops before the first one whose acceptance bound
    1 − sqrt(γ · H(q)) is below λ; λ follows each sequence's acceptance (`stopping.committed`).

    The first token is always drafted: its distribution is there already, and a chain that drafts nothing learns
    nothing. Acceptance is told from the room that the last round took, so one drafter must have drafted each round.
    """

    depth: int
    stop: EntropyStop = field(default_factory=EntropyStop)
    _remembered: Remembered = field(default_factory=Remembered, init=False, repr=False, compare=False)

    @property
    def budget(self) -> int:
        return self.depth

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        before = self._remembered.of(state)
        now = committed(before, limits.room, self.stop) if before else fresh(limits.room, self.stop)
        log_q = proposal.log_q[:, 0]
        going = limits.room > 0
        path = torch.zeros_like(log_q[:, 0])
        tokens, parents, scores = [], [], []
        for depth in range(1, self.depth + 1):
            value, best = log_q.max(dim=-1)
            path = (path + value).masked_fill(~going, -torch.inf)
            token = drafter.vocab.to_target(best)
            tokens.append(token[:, None])
            parents.append(torch.full_like(best, depth - 2)[:, None])
            scores.append(path[:, None])
            going = (path > -torch.inf) & (limits.room > depth) & ~torch.isin(token, limits.ends)
            # A pass is spared where every chain has stopped, at the price of asking the device.
            if depth == self.depth or not bool(going.any()):
                break
            slots = torch.full_like(best, depth - 2)[:, None]
            log_q = drafter.expand(state, Frontier(token[:, None], slots, depth)).log_q[:, 0]
            going = going & (acceptance_bound(log_q, self.stop.gamma) >= now.value)
        tree = pruned(tree_of(tokens, parents, scores), self.budget, limits.room)
        self._remembered.keep(state, replace(now, drafted=tree.counts))
        return tree


@dataclass(frozen=True)
class CostAwareGrowth:
    """A dynamic tree of as many nodes as maximise expected tokens per second, by stored costs (CaDDTree, 2606.01813).

    It is drafted no deeper where another pass can't pay for itself. Each sequence decides for itself, from its drafted
    probabilities, its length and the costs alone: a batch drafts what each would alone, and a replay what was decoded.

    Attributes:
        round_ms: milliseconds of a round of 0 … budget nodes, drafted to `depth`.
        contexts, by_context: lengths at which these costs were measured, and the costs there; none: they hold for all.
        pass_ms: milliseconds of drafting one depth more; 0: it is not known, and all depths are drafted.
    """

    round_ms: tuple[float, ...]
    depth: int
    width: int
    contexts: tuple[int, ...] = ()
    by_context: tuple[tuple[float, ...], ...] = ()
    pass_ms: float = 0.0

    @property
    def budget(self) -> int:
        return len(self.round_ms) - 1

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        if self.contexts and limits.draws is not None:
            costs = at_contexts(self.by_context, self.contexts, limits.draws.positions)
        else:
            whole = torch.tensor(self.round_ms, dtype=torch.float64, device=limits.room.device)
            costs = whole.expand(len(limits.room), -1)

        def drafted_to(depth: Tensor | int) -> Tensor:
            spared = torch.as_tensor(self.depth - depth, device=costs.device) * self.pass_ms
            return costs - spared.reshape(-1, 1)

        def worth(frontier: Tensor, pool: Tensor, level: int) -> Tensor:
            return pays(frontier, pool, drafted_to(level), self.pass_ms)

        tree = dynamic(drafter, state, proposal, self.depth, self.width, limits, worth if self.pass_ms else None)
        known = (tree.log_q > -torch.inf) & (tree.depths <= limits.room[:, None])
        reached = tree.depths.masked_fill(~known, 1).amax(1)
        return affordable(tree, drafted_to(reached), limits.room)
