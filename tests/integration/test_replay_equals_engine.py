"""A replayed answer goes through the rounds of the engine that wrote it: same trees and counts, greedy and sampled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, CostAwareGrowth, DynamicGrowth, Growth
from draftsmith.decoding.trace import Generation
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.unrolled import UnrollBatch
from draftsmith.evaluation.replayed import replay
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import VOCAB, OracleDrafter, prompts, tiny_eagle, tiny_head, tiny_target

COUNT, NEW, KIND = 20, 24, "qwen3"
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, top_p=0.95, seed=3)}
HEADS: dict[str, Any] = {"eagle3": tiny_head, "eagle": tiny_eagle}
GROWTHS: dict[str, Growth] = {
    "chain": ChainGrowth(3),
    "tree": DynamicGrowth(15, 4, 4),
    "stopping tree": DynamicGrowth(15, 5, 4, least_mass=0.3),
    "cost-aware": CostAwareGrowth(tuple(10 + 0.3 * k for k in range(16)), 5, 4, pass_ms=1.0),
}


@cache
def answers(name: str) -> tuple[list[list[int]], list[Generation], list[StoredAnswer]]:
    """Twenty plain answers with the states that a teacher-forced pass over them gives."""
    target = tiny_target(KIND)
    asked = prompts(COUNT, seed=50)
    plain = Engine(target).generate(asked, SAMPLINGS[name], NEW)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    ids = torch.zeros((COUNT, max(map(len, texts))), dtype=torch.int64)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = torch.tensor(text)
    want = tiny_head(KIND).wants | FeatureSpec(final=True)
    hidden = target.read(ids, [len(t) for t in texts], want)
    stored = [
        StoredAnswer(text, len(prompt), {k: hidden[k][b, : len(text)] for k in want.names}, g.finish == "stop")
        for b, (text, prompt, g) in enumerate(zip(texts, asked, plain, strict=True))
    ]
    return asked, plain, stored


@cache
def trained_head(kind: str, name: str) -> Head:
    """A head over half of the vocabulary, taught the twenty answers for some seconds, so that drafts are accepted."""
    stored = answers(name)[2]
    vocab = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 4 != 1], VOCAB)
    head = HEADS[kind](KIND, vocab, initializer_range=0.05)
    width = max(len(a.ids) for a in stored)
    ids = torch.zeros((COUNT, width), dtype=torch.int64)
    features = torch.zeros((COUNT, width, len(head.wants.names) * head.options.hidden_size))
    segments = torch.full((COUNT, width), -1)
    for b, answer in enumerate(stored):
        n = len(answer.ids)
        ids[b, :n] = torch.tensor(list(answer.ids))
        features[b, :n] = head.wants.gather(answer.hidden)
        segments[b, :n] = 0
    steps = 3
    places = torch.arange(width).expand(COUNT, -1)
    batch = UnrollBatch(ids, features, segments, places, places, segments >= 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.zeros(())
        for out in head.unroll(batch, steps):
            following = ids.roll(-2 - out.step, 1)
            wanted = vocab.to_draft(following)
            inside = (segments.roll(-2 - out.step, 1) >= 0) & (places < width - 2 - out.step) & (wanted >= 0)
            loss = loss + F.cross_entropy((head.judged(out.states) @ head.output.T)[inside], wanted[inside])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def counted(generations: list[Generation]) -> list[Any]:
    """All that a trace says but time."""
    return [
        (
            g.token_ids,
            g.finish,
            [(r.nodes, r.reached, r.accepted, r.committed, r.kept, r.owners, r.context) for r in g.rounds],
        )
        for g in generations
    ]


def drafter_of(kind: str, name: str, rows: list[int]) -> Drafter:
    if kind in HEADS:
        return trained_head(kind, name)
    return OracleDrafter([answers(name)[2][b].ids for b in rows], 0.6)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", ["oracle", *HEADS])
@pytest.mark.parametrize("batch", [4, COUNT])
def test_replay_goes_through_the_engines_rounds(name: str, growth: str, kind: str, batch: int) -> None:
    asked, plain, stored = answers(name)
    everyone = list(range(COUNT))
    decoded: list[Generation] = []
    replayed: list[Generation] = []
    for start in range(0, COUNT, batch):
        rows = everyone[start : start + batch]
        engine = Engine(tiny_target(KIND), Single(drafter_of(kind, name, rows), GROWTHS[growth]))
        own = [asked[b] for b in rows]
        decoded += engine.generate(own, SAMPLINGS[name], NEW, requests=rows)
        replay = ReplayTarget(tiny_target(KIND).spec, [stored[b] for b in rows])
        engine = Engine(replay, Single(drafter_of(kind, name, rows), GROWTHS[growth]))
        replayed += engine.generate(own, max_new_tokens=NEW)
    assert [g.token_ids for g in decoded] == [g.token_ids for g in plain]
    assert counted(replayed) == counted(decoded)
    accepted = {r.accepted for g in decoded for r in g.rounds}
    assert accepted >= {0, 1, 2, 3}, f"only depths {accepted} were accepted"
    if name == "sampled":
        assert {g.finish for g in decoded} == {"stop", "length"}


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_replay_knows_that_a_complete_answer_had_room(growth: str) -> None:
    """`replay` is told no limit; up to the last token its trees are those of the engine that had one far away."""
    asked, plain, stored = answers("sampled")
    rows = [b for b in range(COUNT) if stored[b].complete and len(plain[b].token_ids) < NEW - 6]
    assert len(rows) >= 3
    for b in rows:
        drafter = drafter_of("eagle3", "sampled", [b])
        engine = Engine(tiny_target(KIND), Single(drafter, GROWTHS[growth]))
        decoded = engine.generate([asked[b]], SAMPLINGS["sampled"], NEW, requests=[b])
        assert counted(replay(Single(drafter, GROWTHS[growth]), tiny_target(KIND).spec, [stored[b]])) == counted(
            decoded
        )
