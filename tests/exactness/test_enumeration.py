"""The law itself: on a tiny vocabulary in float64, every text of two and three tokens is forced through the engine, and
the probability that the engine's processed scores gave to each token, at the row that chose it, is the target's own.

The keyed draw that is replaced here is judged below: its frequencies against p, and the independence of its streams.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding import verification
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, Growth
from draftsmith.decoding.tree import DraftTree
from draftsmith.foundation import seeding
from draftsmith.target import sampling as sampling_module
from draftsmith.target.sampling import Sampling, draw, next_tokens
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.laws import law_by_hand
from tests.tiny import END, OracleDrafter, tiny_target

V = 12
PROMPT = [9, 8, 11, 10, 9]
FIRST = 8
SAMPLINGS = {
    "bare": Sampling(temperature=1.0),
    "temperature": Sampling(temperature=0.6),
    "penalty-top-k": Sampling(temperature=1.4, repetition_penalty=1.7, top_k=7),
    "no-repeat-top-p": Sampling(temperature=0.9, no_repeat_ngram_size=2, top_p=0.85),
    "suppress-min-p": Sampling(temperature=1.2, suppress_tokens=(3, 10), min_p=0.08),
}
GROWTHS: dict[str, Growth] = {"chain": ChainGrowth(2), "tree": DynamicGrowth(6, 2, 3)}


@dataclass
class Forced:
    """Replaces the draw: gives each key its token, so each request writes its text, and keeps every pass's laws."""

    tokens: dict[int, int]
    laws: list[Tensor] = field(default_factory=list)

    def draw(self, scores: Tensor, keys: Tensor | None, sampling: Sampling) -> Tensor:
        assert keys is not None
        self.laws.append(scores.softmax(dim=-1))
        return torch.tensor([self.tokens[k] for k in keys.tolist()])


def forced_probabilities(
    monkeypatch: pytest.MonkeyPatch,
    growth: Growth | Callable[[list[list[int]]], Composition],
    sampling: Sampling,
    tails: list[list[int]],
) -> tuple[dict[tuple[int, ...], float], Counter[int]]:
    """The probability with which the engine commits each text `FIRST + tail`, given the prompt and FIRST.

    All texts are decoded in one batch, by an oracle with this growth or by a composition made of the texts. A text that
    is met at an end token stands for all that begin with it.
    """
    target = tiny_target("llama", V, torch.float64)
    texts = [[*PROMPT, FIRST, *tail] for tail in tails]
    batch = len(texts)
    forced: dict[int, int] = {}
    positions = torch.arange(len(PROMPT), len(PROMPT) + 12)[None]
    for b, text in enumerate(texts):
        row = seeding.position_keys(sampling.seed, [b], positions, "token")[0].tolist()
        for place, key in zip(positions[0].tolist(), row, strict=True):
            forced[key] = text[place] if place < len(text) else 0
    recorder = Forced(forced)
    laws: list[list[float]] = [[] for _ in texts]
    accepted: Counter[int] = Counter()

    def walk(tree: DraftTree, chosen: Tensor) -> verification.Verdict:
        verdict = verification_walk(tree, chosen)
        law = recorder.laws[-1].unflatten(0, (batch, 1 + tree.size))
        for b, (nodes, tokens) in enumerate(zip(verdict.nodes, verdict.tokens, strict=True)):
            rows = [0, *(n + 1 for n in nodes)]
            laws[b] += [float(law[b, row, token]) for row, token in zip(rows, tokens, strict=True)]
        return verdict

    verification_walk = verification.walk
    monkeypatch.setattr(sampling_module, "draw", recorder.draw)
    monkeypatch.setattr(verification, "walk", walk)
    if callable(growth):
        composition = growth(texts)
    else:
        composition = Single(OracleDrafter(texts, 0.5, VocabMap.identity(V)), growth)
    found = Engine(target, composition).generate([PROMPT] * batch, sampling, 1 + len(tails[0]))
    probabilities: dict[tuple[int, ...], float] = {}
    for b, generation in enumerate(found):
        written = generation.token_ids
        stop = written.index(END) + 1 if END in written else len(written)
        assert written == [FIRST, *tails[b]][:stop]
        accepted.update(r.accepted for r in generation.rounds)
        probabilities[tuple(written[1:])] = math.prod(laws[b][: len(written) - 1])
    return probabilities, accepted


def target_probabilities(sampling: Sampling, count: int) -> dict[tuple[int, ...], float]:
    """The same law from transformers' own uncached passes, the processors written out by hand."""
    model = tiny_target("llama", V, torch.float64).model
    complete: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        tails = list(level)
        ids = torch.tensor([[*PROMPT, FIRST, *tail] for tail in tails])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        longer: dict[tuple[int, ...], float] = {}
        for tail, row in zip(tails, logits.tolist(), strict=True):
            for token, p in enumerate(law_by_hand(row, [*PROMPT, FIRST, *tail], sampling)):
                reached = complete if token == END else longer
                reached[(*tail, token)] = level[tail] * p
        level = longer
    return {**complete, **level}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("count", [2, 3])
def test_the_engines_law_is_the_targets(monkeypatch: pytest.MonkeyPatch, growth: str, name: str, count: int) -> None:
    tails = [list(tail) for tail in itertools.product(range(V), repeat=count)]
    found, accepted = forced_probabilities(monkeypatch, GROWTHS[growth], SAMPLINGS[name], tails)
    expected = target_probabilities(SAMPLINGS[name], count)
    assert found.keys() == expected.keys()
    assert max(abs(found[tail] - expected[tail]) for tail in expected) < 1e-10
    assert abs(math.fsum(found.values()) - 1) < 1e-10
    assert set(accepted) == set(range(count)), "the committed tokens were not both drafted and bonus tokens"


def chi_squared(counts: Tensor, p: Tensor) -> float:
    """Pearson's χ² in standard deviations, (χ² − k) / √(2k) for k degrees of freedom."""
    assert int(counts[p == 0].sum()) == 0, "a token of probability 0 was drawn"
    expected = p[p > 0] * counts.sum()
    k = int((p > 0).sum()) - 1
    statistic = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    return (statistic - k) / math.sqrt(2 * k)


def many_draws(scores: Tensor, n: int, seed: int = 0, purpose: str = "token", request: Any = 0) -> Tensor:
    keys = seeding.position_keys(seed, [request], torch.arange(n)[None], purpose)[0]
    return draw(scores.expand(n, -1), keys, Sampling(temperature=1.0))


@pytest.mark.parametrize("case", range(4))
def test_the_keyed_draw_has_the_law_p(case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    scores = torch.randn(V, generator=generator, dtype=torch.float64) * (1, 2, 3, 1)[case]
    if case == 3:
        scores[[2, 5]] = -torch.inf
    drawn = many_draws(scores[None], 300_000)
    assert abs(chi_squared(torch.bincount(drawn, minlength=V), scores.softmax(-1))) < 5


def test_a_draw_from_a_wrong_law_is_noticed() -> None:
    """The χ² above has the power that it needs: one percent of one token's mass is seen."""
    scores = torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = scores.softmax(-1)
    wrong = p.clone()
    wrong[3] += 0.01
    drawn = many_draws(scores[None], 300_000)
    assert chi_squared(torch.bincount(drawn, minlength=V), wrong / wrong.sum()) > 10


@pytest.mark.parametrize("other", ["purpose", "seed", "request", "position"])
def test_draws_of_other_streams_are_independent(other: str) -> None:
    n = 200_000
    scores = torch.randn(1, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = many_draws(scores, n)
    two = {
        "purpose": lambda: many_draws(scores, n, purpose="acceptance"),
        "seed": lambda: many_draws(scores, n, seed=1),
        "request": lambda: many_draws(scores, n, request=1),
        "position": lambda: one.roll(1),
    }[other]()
    p = scores[0].softmax(-1)
    pairs = torch.bincount(one * V + two, minlength=V * V)
    assert abs(chi_squared(pairs, torch.outer(p, p).reshape(-1))) < 5


def test_draws_are_equal_where_seed_request_and_position_are() -> None:
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(2)).expand(3, 200, -1)
    positions = torch.arange(200).expand(3, -1)

    def drawn(seed: int, requests: list[int | str], at: Tensor = positions) -> Tensor:
        return next_tokens(logits, Sampling(temperature=1.0, seed=seed), requests, at)

    base = drawn(5, ["a", "b", "a"])
    assert torch.equal(base[0], base[2])
    assert torch.equal(base, drawn(5, ["a", "b", "a"]))
    assert torch.equal(base[:, 10:], drawn(5, ["a", "b", "a"], positions + 10)[:, :-10])
    for differing in (base[1], drawn(6, ["a", "b", "a"])[0], drawn(5, ["a", "b", "a"], positions + 1)[0]):
        assert 0.02 < float((base[0] == differing).float().mean()) < 0.6


def test_committed_tokens_of_a_frozen_tree_have_the_law_p() -> None:
    """10⁵ requests walk one tree over the same logits: how often each text is committed, against the rows' product."""
    n = 100_000
    generator = torch.Generator().manual_seed(7)
    # root → 2, 5; 2 → 1, 4; 5 → 5; all 5 nodes, then the bonus
    tokens = torch.tensor([2, 5, 1, 4, 5])
    parents = torch.tensor([-1, -1, 0, 0, 1])
    depths = torch.tensor([1, 1, 2, 2, 2])
    tree = DraftTree(
        tokens.expand(n, -1),
        parents.expand(n, -1),
        depths.expand(n, -1),
        torch.zeros(n, 5),
        torch.zeros((n, 5), dtype=torch.int64),
        torch.full((n,), 5),
    )
    logits = torch.randn(1, 6, 6, generator=generator, dtype=torch.float64) * 1.5
    chosen = verification.choices(tree, logits.expand(n, -1, -1), Sampling(temperature=1.0), range(n), [[9, 9]] * n)
    found = Counter(tuple(text) for text in verification.walk(tree, chosen).tokens)
    p = logits[0].softmax(-1).tolist()
    law: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, tuple[int, ...], float]] = [(-1, (), 1.0)]
    while frontier:
        node, text, mass = frontier.pop()
        for token in range(6):
            child = [i for i in range(5) if parents[i] == node and tokens[i] == token]
            share = mass * p[node + 1][token]
            if child:
                frontier.append((child[0], (*text, token), share))
            else:
                law[(*text, token)] = share
    assert abs(math.fsum(law.values()) - 1) < 1e-12
    assert found.keys() <= law.keys()
    texts = sorted(law)
    counts = torch.tensor([found[t] for t in texts], dtype=torch.float64)
    assert abs(chi_squared(counts, torch.tensor([law[t] for t in texts], dtype=torch.float64))) < 5
