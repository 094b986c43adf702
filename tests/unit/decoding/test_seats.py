"""Members that catch up read what they would have read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding.composition import Seat, Single, joined, seated
from draftsmith.decoding.growth import DynamicGrowth, Limits
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.composition_checks import a_seat_that_catches_up_proposes_the_same
from tests.tiny import END, VOCAB, OracleDrafter, tiny_head


def test_rounds_are_joined_row_by_row() -> None:
    lengths = [[3, 1, 0], [0, 2, 1], [2, 2, 0]]
    pieces = []
    expected: list[list[int]] = [[], [], []]
    for turn, counts in enumerate(lengths):
        width = max(counts)
        tokens = torch.tensor([[100 * turn + 10 * b + i for i in range(width)] for b in range(3)])
        pieces.append((tokens, {5: tokens[:, :, None].float() / 2}, counts))
        for b, count in enumerate(counts):
            expected[b] += tokens[b, :count].tolist()
    tokens, hidden, together = joined(pieces)
    assert together == [5, 5, 1]
    assert tokens.shape == (3, 5)
    for b in range(3):
        assert tokens[b, : together[b]].tolist() == expected[b]
        assert (hidden[5][b, : together[b], 0] * 2).tolist() == expected[b]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_catching_up_proposes_what_reading_at_once_would(dtype: torch.dtype) -> None:
    """For a head: the same trees, and log probabilities as close as matrix products of other widths are."""
    head = tiny_head().to(dtype)
    a_seat_that_catches_up_proposes_the_same(head, 2e-6 if dtype == torch.float32 else 1e-12)


def test_catching_up_is_exact_where_nothing_is_computed_in_floats() -> None:
    texts = [[20 + (3 * i * (b + 1)) % 60 for i in range(60)] for b in range(3)]
    for drafter in (OracleDrafter(texts, 0.5), NgramDrafter(NgramOptions(), VocabMap.identity(VOCAB))):
        a_seat_that_catches_up_proposes_the_same(drafter, 0.0, texts)


def test_an_idle_seat_does_not_read() -> None:
    calls: list[list[int]] = []

    class Noting(OracleDrafter):
        def observe(self, state: Any, tokens: Tensor, features: Tensor | None, lengths: Any) -> Any:
            calls.append(list(lengths))
            return super().observe(state, tokens, features, lengths)

    text = list(range(20, 50))
    seat: Seat = seated([Single(Noting([text], 0.5), DynamicGrowth(6, 3, 2))], 1, 64)[0]
    for start, end in ((0, 4), (4, 5), (5, 9)):
        seat.hear(torch.tensor([text[start:end]]), {}, [end - start])
    assert calls == []
    assert seat.proposal is None
    seat.read()
    seat.read()
    assert calls == [[9]]
    assert seat.proposal is not None
    tree = seat.part.propose(seat.state, Limits(torch.tensor([5]), torch.tensor([END])))
    assert int(tree.counts) == 6
