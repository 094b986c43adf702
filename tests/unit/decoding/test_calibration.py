"""Fitted temperatures against drafters whose temperature is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding.calibration import GRID, Surveyed, Tally, Tempered, fitted
from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.decoding.hindsight import Step
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import END, tiny_target

SIZE = 12


def law(text: Sequence[int]) -> Tensor:
    """A made language: the next token's log probabilities after the last two tokens, `[SIZE]`."""
    generator = torch.Generator().manual_seed(seeding.key("law", *text[-2:]) % 2**31)
    logits = torch.randn(SIZE, generator=generator, dtype=torch.float64) * 1.5
    logits[END] = -30
    return logits.log_softmax(-1)


def written(count: int, seed: int) -> list[int]:
    """A text of that language."""
    generator = torch.Generator().manual_seed(seed)
    text = [1, 2]
    for _ in range(count):
        text.append(int(torch.multinomial(law(text).exp(), 1, generator=generator)))
    return text


class Knows:
    """Knows the law, and is sharper or flatter than it by a temperature for the root and one for deeper nodes."""

    def __init__(self, root: float, deeper: float) -> None:
        self.root, self.deeper = root, deeper
        self.wants, self.vocab = FeatureSpec(), VocabMap.identity(SIZE)

    def start(self, batch: int, capacity: int) -> dict[str, Any]:
        return {"texts": [[] for _ in range(batch)], "nodes": []}

    def observe(
        self, state: dict[str, Any], tokens: Tensor, features: Tensor | None, lengths: Sequence[int]
    ) -> Proposal:
        for text, row, n in zip(state["texts"], tokens.tolist(), lengths, strict=True):
            text += row[:n]
        state["nodes"] = [[] for _ in lengths]
        rows = torch.stack([law(text) for text in state["texts"]])
        return Proposal((rows / self.root).log_softmax(-1)[:, None])

    def expand(self, state: Any, frontier: Frontier) -> Proposal:
        rows = []
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            known = list(state["nodes"][b])
            for token, parent in zip(tokens, parents, strict=True):
                path = [*(known[parent] if parent >= 0 else []), token]
                state["nodes"][b].append(path)
                rows.append(law([*state["texts"][b][-3:], *path]))
        return Proposal((torch.stack(rows).unflatten(0, frontier.tokens.shape) / self.deeper).log_softmax(-1))


def surveyed(drafter: Any, answers: int = 40) -> Surveyed:
    survey = Surveyed(drafter, DynamicGrowth(10, 3, 4), 3)
    texts = [written(60, seed) for seed in range(answers)]
    stored = [StoredAnswer(text, 2, {}, False) for text in texts]
    Engine(ReplayTarget(tiny_target("llama").spec, stored), survey).generate([t[:2] for t in texts], None, 60)
    return survey


def test_the_temperature_that_was_put_in_is_taken_out() -> None:
    """Sharpened by 0.5 at the root, flattened by 1.6 below: what makes it right again is 2 and 1 / 1.6."""
    found = fitted(surveyed(Knows(0.5, 1.6)).tally)
    assert [f.depth for f in found] == [1, 2, 3]
    assert found[0].temperature == pytest.approx(2.0, rel=0.13)
    assert found[1].temperature == pytest.approx(1 / 1.6, rel=0.13)
    for f in found[:2]:
        assert f.roots > 400
        assert f.nll[1] < f.nll[0]
        assert f.error[1] < 0.5 * f.error[0]
    right = fitted(surveyed(Knows(1.0, 1.0), 20).tally)
    assert all(0.85 < f.temperature < 1.2 for f in right[:2])


def test_surveying_changes_no_round() -> None:
    texts = [written(60, seed) for seed in range(5)]
    stored = [StoredAnswer(text, 2, {}, False) for text in texts]
    rounds = []
    for composition in (
        Surveyed(Knows(0.7, 1.3), DynamicGrowth(10, 3, 4), 3),
        Single(Knows(0.7, 1.3), DynamicGrowth(10, 3, 4)),
    ):
        found = Engine(ReplayTarget(tiny_target("llama").spec, stored), composition).generate(
            [t[:2] for t in texts], None, 60
        )
        rounds.append([[(r.nodes, r.reached, r.accepted) for r in g.rounds] for g in found])
    assert rounds[0] == rounds[1]


def test_a_tally_counts_the_children_of_tested_nodes() -> None:
    """Likelihood and bins of a step against sums written out."""
    generator = torch.Generator().manual_seed(5)
    log_q = torch.randn(6, SIZE, generator=generator).log_softmax(-1)
    tokens = torch.tensor([int(log_q[0].argmax()), 3, 4, 5, int(log_q[4].argmin()), 0])
    tested = torch.tensor([True, True, False, True, True, False])
    tally = Tally(2, 3)
    tally.add(Step(2, log_q, tokens, tested, tested), VocabMap.identity(SIZE))
    assert tally.roots == [0, 4]
    for i, temperature in ((0, GRID[0]), (17, GRID[17]), (len(GRID), 1.0)):
        nll, nodes, accepted = 0.0, 0, 0
        bins = [0.0] * 10
        for row in range(6):
            if not tested[row]:
                continue
            p = (log_q[row].double() / temperature).softmax(-1)
            for token in log_q[row].topk(3).indices.tolist():
                hit = token == int(tokens[row])
                nll -= float(torch.log(p[token] if hit else 1 - p[token]))
                nodes += 1
                accepted += hit
                bins[min(int(p[token] * 10), 9)] += float(p[token])
        assert float(tally.nll[1, i]) == pytest.approx(nll, rel=1e-6)
        assert float(tally.nodes[1, i].sum()) == nodes
        assert float(tally.accepted[1, i].sum()) == accepted
        assert tally.probability[1, i].tolist() == pytest.approx(bins)
    assert float(tally.nll[0].abs().sum()) == 0


def test_tempered_probabilities_are_those_of_the_temperature() -> None:
    drafter = Tempered(Knows(1.0, 1.0), (2.0, 1.0, 0.5))
    state = drafter.start(1, 9)
    bare = Knows(1.0, 1.0)
    other = bare.start(1, 9)
    tokens = torch.tensor([[1, 2, 3]])
    for depth, temperature in enumerate((2.0, 1.0, 0.5, 0.5)):
        frontier = Frontier(torch.tensor([[4]]), torch.tensor([[depth - 2]]), depth)
        if depth:
            found, plain = drafter.expand(state, frontier).log_q, bare.expand(other, frontier).log_q
        else:
            found, plain = drafter.observe(state, tokens, None, [3]).log_q, bare.observe(other, tokens, None, [3]).log_q
        powers = plain.exp() ** (1 / temperature)
        assert torch.allclose(found.exp(), powers / powers.sum(-1, keepdim=True), atol=1e-9)
