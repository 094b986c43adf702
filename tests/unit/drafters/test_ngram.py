"""The n-gram drafter against a scan of the whole text for each context."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from draftsmith.drafters.base import Frontier
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.target.vocabulary import VocabMap

WIDE = 7


def scanned(text: list[int], path: list[int], options: NgramOptions, vocab: VocabMap) -> list[float]:
    """Probabilities after committed `text` and drafted `path`, by looking at every place of the text."""
    context = text + path
    shares = [0.0] * vocab.vocab_size
    left = 1.0
    for n in range(options.n_max, options.n_min - 1, -1):
        if n > len(context):
            continue
        suffix = context[len(context) - n :]
        after = [text[i] for i in range(n, len(text)) if text[i - n : i] == suffix]
        if not after:
            continue
        trust = n / (n + options.prior)
        for token in set(after):
            shares[token] += left * trust * (after.count(token) + (after[-1] == token)) / (len(after) + 1)
        left -= left * trust
    kept = [shares[t] for t in vocab.target_ids.tolist()]
    rest = (1 - sum(kept)) / len(kept) if options.guess else 0.0
    return [p + rest for p in kept]


def frontier(tokens: list[list[int]], parents: list[list[int]], depth: int) -> Frontier:
    return Frontier(torch.tensor(tokens), torch.tensor(parents), depth)


texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(
    rows=st.lists(st.tuples(texts, st.lists(texts, max_size=3)), min_size=1, max_size=3),
    n_max=st.integers(1, 4),
    n_min=st.integers(1, 4),
    prior=st.sampled_from([0.25, 1.0, 3.0]),
    guess=st.booleans(),
    reduced=st.booleans(),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_proposals_equal_a_scan(
    rows: list[tuple[list[int], list[list[int]]]],
    n_max: int,
    n_min: int,
    prior: float,
    guess: bool,
    reduced: bool,
    data: st.DataObject,
) -> None:
    """Prompts, then rounds of different lengths (0 too), each with two depths of nodes that the next round drops."""
    options = NgramOptions(n_max=n_max, n_min=min(n_min, n_max), prior=prior, guess=guess)
    vocab = VocabMap(torch.tensor([0, 2, 5]), WIDE) if reduced else VocabMap.identity(WIDE)
    drafter = NgramDrafter(options, vocab)
    state = drafter.start(len(rows), 64)
    read: list[list[int]] = [[] for _ in rows]
    for turn in range(4):
        new = [prompt if turn == 0 else (more[turn - 1] if turn <= len(more) else []) for prompt, more in rows]
        width = max(1, *map(len, new))
        tokens = torch.tensor([[*n, *[6] * (width - len(n))] for n in new])
        found = drafter.observe(state, tokens, None, [len(n) for n in new]).log_q
        assert found.shape == (len(rows), 1, vocab.size)
        assert found.dtype == torch.float32
        for b, n in enumerate(new):
            read[b] += n
            _same(found[b, 0], scanned(read[b], [], options, vocab))
        first = [data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=2)) for _ in rows]
        found = drafter.expand(state, frontier(first, [[-1, -1]] * len(rows), 1)).log_q
        for b in range(len(rows)):
            for i in range(2):
                _same(found[b, i], scanned(read[b], [first[b][i]], options, vocab))
        second = [data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)) for _ in rows]
        found = drafter.expand(state, frontier(second, [[0, 1, 1]] * len(rows), 2)).log_q
        for b in range(len(rows)):
            for i, parent in enumerate([0, 1, 1]):
                _same(found[b, i], scanned(read[b], [first[b][parent], second[b][i]], options, vocab))


def _same(found: torch.Tensor, expected: list[float]) -> None:
    assert found.exp().tolist() == pytest.approx(expected, abs=1e-6)


def test_by_hand() -> None:
    """After "1 2 3 1 2 4 1 2", of matches of two tokens 3 and 4 followed once each, 4 last; after "2" the same."""
    drafter = NgramDrafter(NgramOptions(n_max=2, n_min=1), VocabMap.identity(10))
    state = drafter.start(1, 64)
    q = drafter.observe(state, torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2]]), None, [8]).log_q[0, 0].exp().tolist()
    rest = (1 - 2 / 3) * (1 - 1 / 2) / 10
    claimed = 2 / 3 + (1 - 2 / 3) / 2
    assert q[3] == pytest.approx(claimed / 3 + rest)
    assert q[4] == pytest.approx(claimed * 2 / 3 + rest)
    assert q[0] == pytest.approx(rest)
    assert sum(q) == pytest.approx(1)


def test_a_longer_match_is_trusted_more_and_nothing_known_is_uniform() -> None:
    drafter = NgramDrafter(NgramOptions(n_max=4), VocabMap.identity(50))
    text = [*range(10, 20), 30, *range(10, 20)]
    sure = float(drafter.observe(drafter.start(1, 64), torch.tensor([text]), None, [21]).log_q[0, 0, 30])
    short = [19, 30, 11, 19]
    less = float(drafter.observe(drafter.start(1, 64), torch.tensor([short]), None, [4]).log_q[0, 0, 30])
    assert sure > less > math.log(0.4)
    new = drafter.observe(drafter.start(1, 64), torch.tensor([[5]]), None, [1]).log_q[0, 0]
    assert new.tolist() == pytest.approx([-math.log(50)] * 50)


def test_without_guessing_nothing_known_has_probability_0() -> None:
    drafter = NgramDrafter(NgramOptions(guess=False), VocabMap.identity(8))
    assert drafter.observe(drafter.start(1, 64), torch.tensor([[5]]), None, [1]).log_q.isneginf().all()


def test_the_index_grows_with_what_was_read_only() -> None:
    """One entry for each n-gram of the text however often it is proposed from: no rescans, nothing provisional."""
    drafter = NgramDrafter(NgramOptions(n_max=3), VocabMap.identity(100))
    state = drafter.start(1, 64)
    drafter.observe(state, torch.arange(60)[None], None, [60])
    entries = len(state.sequences[0].index)
    assert entries == 59 + 58 + 57
    for depth in range(1, 6):
        drafter.expand(state, frontier([[7]], [[depth - 2]], depth))
    assert len(state.sequences[0].index) == entries
    drafter.observe(state, torch.tensor([[99]]), None, [1])
    assert len(state.sequences[0].index) == entries + 3


@pytest.mark.parametrize("wrong", [{"n_max": 0}, {"n_min": 0}, {"n_max": 2, "n_min": 3}, {"prior": 0}])
def test_wrong_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        NgramOptions(**wrong)
