"""VocabMap against sets and lists: what is in it, in which order; both directions and both stored forms agree."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap


@st.composite
def counted(draw: st.DrawFn) -> tuple[list[int], int, set[int]]:
    """Counts of a vocabulary, a size, and ids that must be in."""
    counts = draw(st.lists(st.integers(0, 4), min_size=2, max_size=40))
    always = draw(st.sets(st.integers(0, len(counts) - 1), max_size=5))
    size = draw(st.integers(max(1, len(always)), len(counts) + 10))
    return counts, size, always


def made(case: tuple[list[int], int, set[int]]) -> VocabMap:
    counts, size, always = case
    return VocabMap.from_counts(torch.tensor(counts), size, always, len(counts))


@given(counted())
def test_is_what_a_plain_sort_selects(case: tuple[list[int], int, set[int]]) -> None:
    counts, size, always = case
    size = min(size, len(counts))
    chosen = sorted(always)
    chosen += sorted((i for i, n in enumerate(counts) if n and i not in always), key=lambda i: (-counts[i], i))
    chosen = chosen[:size]
    left = [i for i in range(len(counts)) if i not in chosen]
    fill = left[: size - len(chosen)]
    vocab = made(case)
    assert vocab.target_ids.tolist() == sorted(chosen + fill)
    assert vocab.filled == len(fill)
    assert all(counts[i] == 0 for i in fill)


@given(counted())
def test_strictly_increasing_and_everything_demanded_is_in(case: tuple[list[int], int, set[int]]) -> None:
    counts, size, always = case
    ids = made(case).target_ids.tolist()
    assert all(a < b for a, b in pairwise(ids))
    assert len(ids) == min(size, len(counts))
    assert always <= set(ids)


@given(counted())
def test_both_directions_are_a_bijection(case: tuple[list[int], int, set[int]]) -> None:
    vocab = made(case)
    draft = torch.arange(vocab.size)
    assert vocab.to_draft(vocab.to_target(draft)).tolist() == draft.tolist()
    back = vocab.to_draft(torch.arange(vocab.vocab_size)).tolist()
    assert [i for i, d in enumerate(back) if d >= 0] == vocab.target_ids.tolist()
    assert Counter(d for d in back if d < 0) == Counter({-1: vocab.vocab_size - vocab.size} if -1 in back else {})


@given(counted())
def test_stored_forms_round_trip(case: tuple[list[int], int, set[int]]) -> None:
    vocab = made(case)
    again = VocabMap.from_d2t(vocab.d2t, vocab.vocab_size)
    assert again.target_ids.tolist() == vocab.target_ids.tolist() == [i + int(o) for i, o in enumerate(vocab.d2t)]
    assert again.digest == vocab.digest
    assert vocab.t2d.nonzero().squeeze(1).tolist() == vocab.target_ids.tolist()
    assert vocab.t2d.dtype == torch.bool
    assert vocab.d2t.dtype == torch.int64


@given(counted())
def test_coverage_is_the_share_of_counted_tokens(case: tuple[list[int], int, set[int]]) -> None:
    counts = case[0]
    vocab = made(case)
    if sum(counts) == 0:
        with pytest.raises(ValueError, match="no tokens"):
            vocab.coverage(torch.tensor(counts))
    else:
        covered = sum(n for i, n in enumerate(counts) if i in set(vocab.target_ids.tolist()))
        assert vocab.coverage(torch.tensor(counts)) == pytest.approx(covered / sum(counts))


def test_fills_with_the_lowest_ids() -> None:
    counts = torch.zeros(100, dtype=torch.int64)
    counts[[90, 7, 3]] = torch.tensor([5, 9, 1])
    vocab = VocabMap.from_counts(counts, 8, [99], 100)
    assert vocab.target_ids.tolist() == [0, 1, 2, 3, 4, 7, 90, 99]
    assert vocab.filled == 4


def test_ids_keep_their_shape() -> None:
    vocab = VocabMap(torch.tensor([2, 5, 6]), 8)
    assert vocab.to_target(torch.tensor([[0, 2], [1, 1]])).tolist() == [[2, 6], [5, 5]]
    assert vocab.to_draft(torch.tensor([[0, 2], [6, 7]])).tolist() == [[-1, 0], [2, -1]]
    assert not vocab.is_identity


def test_identity_changes_nothing() -> None:
    vocab = VocabMap.identity(9)
    ids = torch.tensor([[8, 0], [3, 4]])
    assert vocab.to_target(ids).tolist() == vocab.to_draft(ids).tolist() == ids.tolist()
    assert vocab.d2t.tolist() == [0] * 9
    assert vocab.is_identity


def test_digest_tells_maps_apart() -> None:
    ids = torch.tensor([1, 4])
    digests = {VocabMap(ids, 8).digest, VocabMap(ids, 9).digest, VocabMap(torch.tensor([1, 5]), 8).digest}
    assert len(digests) == 3
    assert VocabMap(torch.tensor([1, 4]), 8, filled=1).digest in digests


def test_specials_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="no room for the 3"):
        VocabMap.from_counts(torch.ones(10), 2, [1, 2, 3], 10)


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        ([5, 5, 5, 5], "outside the target's vocabulary of 8"),
        ([0, -2, 0], "outside"),
        ([3, 1, 1], "strictly increasing"),
        ([2, 1], "strictly increasing"),
        ([], "shape is \\[0\\]"),
    ],
)
def test_broken_offsets_are_refused(d2t: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VocabMap.from_d2t(torch.tensor(d2t, dtype=torch.int64), 8)


@pytest.mark.parametrize("ids", [[3, 3], [4, 1], [0, 8], [-1, 2], []])
def test_a_map_out_of_order_cannot_be_made(ids: list[int]) -> None:
    with pytest.raises(ValueError):
        VocabMap(torch.tensor(ids, dtype=torch.int64), 8)
