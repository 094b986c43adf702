"""Every growth policy and the n-gram drafter write what plain decoding writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import (
    AdaEDLGrowth,
    BestFirstGrowth,
    ChainGrowth,
    CostAwareGrowth,
    DynamicGrowth,
    Growth,
    StaticGrowth,
)
from draftsmith.decoding.stopping import EntropyStop
from draftsmith.decoding.trace import Generation
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.checks import speculative_equals_plain
from tests.tiny import END, VOCAB, OracleDrafter, prompts, tiny_target

NEW = 32
POLICIES: dict[str, Growth] = {
    "static": StaticGrowth(),
    "best-first": BestFirstGrowth(12, 6, 3),
    # the oracle's entropy is 2.5 nats where it is sure (bound 0.29), 4.2 where it is not (bound 0.08)
    "adaedl": AdaEDLGrowth(6, EntropyStop(start=0.2, goal=0.6, step=0.03)),
    "cost-aware": CostAwareGrowth(tuple(10 + 0.6 * k for k in range(16)), 5, 4, pass_ms=0.8),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_plain_decoding(policy: str, batch: int, temperature: float) -> None:
    """Over a few seeds, nothing accepted, paths of each length to 3 and trees of different sizes did occur."""
    accepted: set[int] = set()
    nodes: set[int] = set()
    for seed in range(4):
        sampling = Sampling(temperature=temperature, seed=seed)
        found = speculative_equals_plain("llama", POLICIES[policy], sampling, batch, dial=0.7)
        accepted |= {r.accepted for g in found for r in g.rounds}
        nodes |= {r.nodes for g in found for r in g.rounds}
    assert {0, 1, 2, 3} <= accepted
    assert len(nodes) >= (2 if policy in ("static", "best-first") else 4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_equals_each_alone_and_replay_equals_both(policy: str) -> None:
    """The same rounds: a policy decides from a sequence's own drafts and what it committed."""
    target = tiny_target("qwen3")
    asked = prompts(4, seed=9)
    sampling = Sampling(temperature=0.9, seed=5, suppress_tokens=(END,))
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, NEW), strict=True)]

    def rounds(generations: list[Generation]) -> list[list[tuple[int, int, int]]]:
        return [[(r.nodes, r.reached, r.accepted) for r in g.rounds] for g in generations]

    def engine(own: list[list[int]]) -> Engine:
        return Engine(target, Single(OracleDrafter(own, 0.7), POLICIES[policy]))

    # The oracle's draws are keyed by its row, so each text is asked alone in its row among others that are empty.
    together = engine(texts).generate(asked, sampling, NEW)
    assert [g.token_ids for g in together] == [t[len(p) :] for t, p in zip(texts, asked, strict=True)]
    uneven = engine(texts).generate(asked, sampling, [NEW, 1, 1, NEW])
    assert rounds([uneven[0], uneven[3]]) == rounds([together[0], together[3]])
    assert rounds(engine(texts[:1]).generate(asked[:1], sampling, NEW)) == rounds(together[:1])
    answers = [StoredAnswer(t, len(p), {}, False) for t, p in zip(texts, asked, strict=True)]
    replayed = Engine(ReplayTarget(target.spec, answers), Single(OracleDrafter(texts, 0.7), POLICIES[policy]))
    assert rounds(replayed.generate(asked, None, NEW)) == rounds(together)


def _ngram(sampling: Sampling, asked: list[list[int]], growth: Growth, **options: Any) -> list[Generation]:
    target = tiny_target("llama")
    vocab = options.pop("vocab", VocabMap.identity(VOCAB))
    plain = Engine(target).generate(asked, sampling, NEW)
    drafter = NgramDrafter(NgramOptions(**options), vocab)
    found = Engine(target, Single(drafter, growth)).generate(asked, sampling, NEW)
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    assert [g.finish for g in found] == [g.finish for g in plain]
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "growth",
    [ChainGrowth(4), DynamicGrowth(15, 4, 4), *POLICIES.values()],
    ids=["chain", "dynamic", *POLICIES],
)
def test_n_grams_equal_plain_decoding(growth: Growth, batch: int, temperature: float) -> None:
    """Sharpened by few candidates, a random target repeats itself, so that something is accepted at T > 0 too."""
    sampling = Sampling(temperature=temperature, seed=3, top_k=2, suppress_tokens=(END,))
    found = _ngram(sampling, prompts(batch, seed=40), growth)
    assert sum(r.accepted for g in found for r in g.rounds) > 0


@pytest.mark.parametrize("guess", [True, False])
def test_n_grams_of_a_reduced_vocabulary(guess: bool) -> None:
    vocab = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)
    asked = prompts(4, seed=41)
    found = _ngram(Sampling(suppress_tokens=(END,)), asked, DynamicGrowth(8, 4, 3), vocab=vocab, guess=guess)
    nodes = {r.nodes for g in found for r in g.rounds[:-1]}  # the last round may have no room
    assert (0 in nodes) == (not guess), "without guessing some round has nothing to draft, with it none"
    assert 8 in nodes


def test_much_of_a_repetitive_text_is_accepted() -> None:
    """A prompt that repeats a phrase, and a target that must go on with it: whole chains are accepted."""
    phrase = [20, 31, 42, 53, 64]
    asked = [(phrase * 5)[:-k] for k in (1, 2, 3)]
    allowed = (*phrase, END)
    suppressed = tuple(t for t in range(VOCAB) if t not in allowed or t == END)
    sampling = Sampling(suppress_tokens=suppressed)
    found = _ngram(sampling, asked, ChainGrowth(4))
    rounds = [r for g in found for r in g.rounds]
    assert max(r.accepted for r in rounds) == 4
    assert sum(r.committed for r in rounds) / len(rounds) > 2
