"""The rules for sampled candidates: their probabilities against explicit loops, their keyed draws a million times."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.decoding.drawn import Draws, SampledGrowth, candidates, flip, pick, proposed
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.rejection import block_chances, chances, verdict
from draftsmith.decoding.tree import DraftTree, merged, pruned
from draftsmith.decoding.verification import Verification
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.laws import law_by_hand, softmax
from tests.exactness.sampled import chi_squared_is_small, ordered_draws

V = 5


def laws(seed: int, *shape: int) -> Tensor:
    """Random distributions `[*shape, V]`, some with zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand((*shape, V), generator=generator, dtype=torch.float64) ** 3
    weights[torch.rand((*shape, V), generator=generator) < 0.2] = 0
    weights[..., -1] += 0.05
    return weights / weights.sum(-1, keepdim=True)


def by_hand(p: list[float], q: list[float], tokens: list[int], replacement: bool) -> tuple[list[float], list[float]]:
    """Accept x with min(1, p/q), else go on with the residual: one candidate after another."""
    found = []
    for x in tokens:
        found.append(min(1.0, p[x] / q[x]))
        residual = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        p = [r / math.fsum(residual) for r in residual] if math.fsum(residual) > 0 else p
        if not replacement:
            q = [0.0 if i == x else b for i, b in enumerate(q)]
            q = [b / math.fsum(q) for b in q] if math.fsum(q) > 0 else q
    return found, p


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans())
@settings(deadline=None)
def test_the_token_rule_equals_a_loop(seed: int, count: int, replacement: bool) -> None:
    p, q = laws(seed, 4), laws(seed + 1, 4)
    with_noise = candidates(q.log()[:, None], count, replacement, torch.arange(4) + seed)
    tokens, values = with_noise[0][:, 0], with_noise[1][:, 0]
    live = values > -torch.inf
    found, rest = chances(p, q, tokens, live, replacement)
    for b in range(4):
        drawn_tokens = tokens[b][live[b]].tolist()
        expected, left = by_hand(p[b].tolist(), q[b].tolist(), drawn_tokens, replacement)
        assert found[b].tolist() == pytest.approx(expected + [0.0] * (count - len(expected)), abs=1e-12)
        assert rest[b].tolist() == pytest.approx(left, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(0, 3))
@settings(deadline=None)
def test_block_chances_equal_the_papers_formula(seed: int, length: int) -> None:
    p, q = laws(seed, 2, 4), laws(seed + 1, 2, 3)
    tokens = torch.stack([pick(q[:, i], torch.tensor([seed, seed + i])) for i in range(3)], 1)
    coins, rest = block_chances(p, q, tokens, torch.tensor([length, 3]))
    for b, size in enumerate([length, 3]):
        weight = 1.0
        for i in range(size + 1):
            if i:
                x = int(tokens[b, i - 1])
                weight = min(1.0, weight * float(p[b, i - 1, x]) / float(q[b, i - 1, x]))
            if i == size:
                expected, left = weight, p[b, i].tolist()
            else:
                left = [max(weight * a - c, 0.0) for a, c in zip(p[b, i].tolist(), q[b, i].tolist(), strict=True)]
                expected = math.fsum(left) / (math.fsum(left) + 1 - weight) if math.fsum(left) else 0.0
            if i:
                assert float(coins[b, i - 1]) == pytest.approx(expected, abs=1e-12)
            if math.fsum(left):
                share = (rest[b, i] / rest[b, i].sum()).tolist()
                assert share == pytest.approx([x / math.fsum(left) for x in left], abs=1e-9)
        assert coins[b, size:].tolist() == [0.0] * (3 - size)


@pytest.mark.parametrize("replacement", [True, False])
def test_candidates_have_the_law_of_ordered_draws(replacement: bool) -> None:
    q = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    n = 200_000
    keys = seeding.position_keys(0, ["r"], torch.arange(n)[None], "proposal at depth 1")[0]
    ids, log_q = candidates(q.log().expand(n, 1, -1), 2, replacement, keys)
    expected = ordered_draws(q.tolist(), 2, replacement)
    cells = (ids[:, 0, 0] * 4 + ids[:, 0, 1]).bincount(minlength=16).tolist()
    chi_squared_is_small(cells, [expected.get((a, b), 0.0) for a in range(4) for b in range(4)])
    assert torch.equal(log_q, q.log()[ids])


def test_more_candidates_than_there_are_tokens_are_not_drawn() -> None:
    q = torch.tensor([[[0.5, 0.0, 0.5]]], dtype=torch.float64)
    ids, log_q = candidates(q.log(), 5, False, torch.tensor([3]))
    assert sorted(ids[0, 0, :2].tolist()) == [0, 2]
    assert (log_q[0, 0] > -torch.inf).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.4, top_k=3, seed=2),
        Sampling(temperature=0.9, top_p=0.7),
        Sampling(temperature=1.1, min_p=0.3),
    ],
)
def test_candidates_are_drawn_at_the_targets_temperature_and_cuts(sampling: Sampling) -> None:
    log_q = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = proposed(log_q, sampling)
    for own, row in zip(found.flatten(0, 1).exp(), log_q.flatten(0, 1), strict=True):
        assert own.tolist() == pytest.approx(law_by_hand(row.tolist(), [], sampling), abs=1e-6)
        assert float(own.sum()) == pytest.approx(1, abs=1e-12)
    greedy = proposed(log_q, Sampling())
    assert greedy.exp().argmax(-1).equal(log_q.argmax(-1))
    assert greedy.exp().sum(-1).tolist() == [[1.0] * 3] * 2
    penalised = proposed(log_q, Sampling(temperature=0.7, repetition_penalty=2.0, suppress_tokens=(1,)))
    assert torch.equal(penalised, proposed(log_q, Sampling(temperature=0.7)))


class Frozen:
    """A drafter whose laws after none, one and two drafted tokens are tables; the state is the drafted tokens."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits
        self.vocab = VocabMap.identity(V)

    def expand(self, state: list[Tensor], frontier: Frontier) -> Proposal:
        if frontier.depth == 1:
            state.append(frontier.tokens)
            return Proposal(self.logits[1][frontier.tokens])
        above = state[0].gather(1, frontier.parents)
        return Proposal(self.logits[2][above, frontier.tokens])


@pytest.mark.parametrize(
    ("rule", "growth"),
    [
        ("token", SampledGrowth((1, 1))),
        ("token", SampledGrowth((2, 2), True)),
        ("token", SampledGrowth((3, 2))),
        ("block", SampledGrowth((1, 1))),
    ],
)
@pytest.mark.parametrize("total", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_verdicts_have_the_targets_law(rule: Verification, growth: SampledGrowth, total: int) -> None:
    """Trees drawn, judged and continued with keyed draws over frozen tables of p and q. Where fewer than three tokens
    were committed the rest is drawn from p by torch, so that all texts have three and their law is p's."""
    generator = torch.Generator().manual_seed(11)
    p_logits = [torch.randn((V,) * n, generator=generator, dtype=torch.float64) for n in (1, 2, 3)]
    q_logits = [(z + torch.randn(z.shape, generator=generator, dtype=torch.float64)).float() / 1.5 for z in p_logits]
    sampling = Sampling(temperature=1.2, seed=4)
    p = [(z / 1.2).softmax(-1) for z in p_logits]
    law = p[0][:, None, None] * p[1][:, :, None] * p[2]
    counts = torch.zeros(V**3, dtype=torch.int64)
    lengths: set[int] = set()
    chunk = 50_000
    for first in range(0, total, chunk):
        at = torch.arange(first, first + chunk)
        draws = Draws(sampling, ["r"] * chunk, at)
        limits = Limits(torch.full((chunk,), 2), torch.tensor([], dtype=torch.int64), draws)
        start = Proposal(q_logits[0].expand(chunk, 1, -1))
        tree = growth.grow(Frozen(q_logits), [], start, limits)  # type: ignore[arg-type]
        below = tree.tokens.gather(1, tree.parents.clamp(min=0))
        deep = p_logits[2][:, :, :][below, tree.tokens] if growth.depth > 1 else None
        assert deep is not None
        own = torch.where((tree.depths == 1)[:, :, None], p_logits[1][tree.tokens], deep)
        logits = torch.cat([p_logits[0].expand(chunk, 1, -1), own], 1)
        found = verdict(tree, logits, sampling, ["r"] * chunk, [range(n) for n in at.tolist()], rule)  # type: ignore[arg-type]
        size = torch.tensor([len(text) for text in found.tokens])
        lengths.update(size.unique().tolist())
        text = torch.tensor([[*tokens, 0, 0][:3] for tokens in found.tokens])
        second = torch.multinomial(p[1][text[:, 0]], 1, generator=generator)[:, 0]
        text[:, 1] = torch.where(size > 1, text[:, 1], second)
        third = torch.multinomial(p[2][text[:, 0], text[:, 1]], 1, generator=generator)[:, 0]
        text[:, 2] = torch.where(size > 2, text[:, 2], third)
        counts += (text[:, 0] * V * V + text[:, 1] * V + text[:, 2]).bincount(minlength=V**3)
    assert lengths == {1, 2, 3}
    assert int(counts.sum()) == total
    chi_squared_is_small(counts.tolist(), law.flatten().tolist())


def sampled_tree() -> DraftTree:
    draws = Draws(Sampling(temperature=1.0), [0], torch.tensor([3]))
    limits = Limits(torch.tensor([2]), torch.tensor([0]), draws)
    logits = [torch.zeros((V,) * n) for n in (1, 2, 3)]
    return SampledGrowth((2, 1)).grow(Frozen(logits), [], Proposal(logits[0][None, None]), limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [lambda t: pruned(t, 2), lambda t: merged([t, t], 4)], ids=["pruned", "merged"])
def test_a_sampled_tree_keeps_its_shape(change: Callable[[DraftTree], DraftTree]) -> None:
    with pytest.raises(UserError, match=r"sampled candidates can't be pruned, re-ranked or merged"):
        change(sampled_tree())


def test_a_sampled_tree_has_its_shape_and_laws() -> None:
    tree = sampled_tree()
    assert tree.parents.tolist() == [[-1, -1, 0, 1]]
    assert tree.depths.tolist() == [[1, 1, 2, 2]]
    assert tree.sampled is not None
    assert tree.sampled.log_q.shape == (1, 3, V)
    assert len(set(tree.tokens[0, :2].tolist())) == 2
    ended = (tree.tokens[0, :2] == 0).tolist()
    assert (tree.log_q[0, 2:] == -torch.inf).tolist() == ended, "below an end token nothing is drafted"


def test_room_cuts_a_sampled_tree_before_it_is_drawn() -> None:
    limits = Limits(torch.tensor([0, 1, 5]), torch.tensor([0]), Draws(Sampling(), ["a", "b", "c"], torch.arange(3)))
    logits = [torch.randn((V,) * n) for n in (1, 2, 3)]
    growth = SampledGrowth((2, 2))
    assert growth.budget == 6
    tree = growth.grow(Frozen(logits), [], Proposal(logits[0].expand(3, 1, -1)), limits)  # type: ignore[arg-type]
    assert tree.counts.tolist() == [0, 2, 6]
    none = growth.grow(
        Frozen(logits),  # type: ignore[arg-type]
        [],
        Proposal(logits[0].expand(1, 1, -1)),
        Limits(torch.tensor([0]), torch.tensor([0]), Draws(Sampling(), [0], torch.tensor([1]))),
    )
    assert none.size == 0
    assert none.sampled is not None


def test_coins_and_streams_are_keyed_by_purpose_and_depth() -> None:
    n = 200_000
    keys = Draws(Sampling(), ["r"] * n, torch.arange(n))
    chance = torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(n, -1)
    coins = flip(chance, keys.keys("acceptance", 1))
    cells = (coins[:, 0] * 2 + coins[:, 1].long()).bincount(minlength=4).tolist()
    chi_squared_is_small(cells, [0.7 * 0.3, 0.7 * 0.7, 0.3 * 0.3, 0.3 * 0.7])
    streams = [keys.keys(purpose, depth) for purpose in ("proposal", "acceptance", "remainder") for depth in (1, 2)]
    law = torch.tensor(softmax([0.3, 1.0, -0.5]), dtype=torch.float64)
    picks = [pick(law.expand(n, -1), stream) for stream in streams]
    for i, one in enumerate(picks):
        for other in picks[:i]:
            chi_squared_is_small(
                (one * 3 + other).bincount(minlength=9).tolist(), torch.outer(law, law).flatten().tolist()
            )
