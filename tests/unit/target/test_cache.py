"""The cache against lists of rows that are copied about by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.target.cache import KeyValueCache

HEADS, WIDTHS, LAYERS = 2, (3, 5), 2
CPU = torch.device("cpu")


class Naive:
    """Each sequence's committed rows, per layer, as a list of `(key [HEADS, 3], value [HEADS, 5])`."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(LAYERS)] for _ in range(batch)]

    def commit(self, keys: list[Tensor], values: list[Tensor], kept: list[list[int]]) -> None:
        for b, nodes in enumerate(kept):
            for layer in range(LAYERS):
                self.rows[b][layer] += [(keys[layer][b, :, n], values[layer][b, :, n]) for n in nodes]


def one_pass(cache: KeyValueCache, naive: Naive, rows: int, generator: torch.Generator) -> tuple[list[Tensor], ...]:
    """Write a pass of random rows and compare all that the layers hand back."""
    cache.expect(rows, CPU)
    keys = [torch.randn(cache.batch, HEADS, rows, WIDTHS[0], generator=generator) for _ in range(LAYERS)]
    values = [torch.randn(cache.batch, HEADS, rows, WIDTHS[1], generator=generator) for _ in range(LAYERS)]
    for layer in range(LAYERS):
        got_keys, got_values = cache.update(keys[layer], values[layer], layer)
        assert got_keys.shape[2] == got_values.shape[2] == cache.span
        for b in range(cache.batch):
            committed = naive.rows[b][layer]
            assert cache.lengths[b] == len(committed)
            for slot, (key, value) in enumerate(committed):
                assert torch.equal(got_keys[b, :, slot], key)
                assert torch.equal(got_values[b, :, slot], value)
            start = len(committed)
            assert torch.equal(got_keys[b, :, start : start + rows], keys[layer][b])
            assert torch.equal(got_values[b, :, start : start + rows], values[layer][b])
    return keys, values


def padded(kept: list[list[int]]) -> Tensor:
    width = max(1, max(map(len, kept)))
    return torch.tensor([k + [0] * (width - len(k)) for k in kept])


@given(st.data(), st.integers(1, 4), st.integers(0, 6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_kept_rows_equal_a_naive_copy(data: st.DataObject, batch: int, capacity: int, seed: int) -> None:
    """Passes of any width, any increasing rows kept (none, too), sequences that leave, buffers that have to grow."""
    generator = torch.Generator().manual_seed(seed)
    cache, naive = KeyValueCache(batch, capacity), Naive(batch)
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.integers(1, 6))
        keys, values = one_pass(cache, naive, rows, generator)
        kept = [sorted(data.draw(st.sets(st.integers(0, rows - 1)))) for _ in range(cache.batch)]
        cache.keep(padded(kept), [len(k) for k in kept])
        naive.commit(keys, values, kept)
        if data.draw(st.booleans()):
            stay = data.draw(st.lists(st.integers(0, cache.batch - 1), min_size=1, max_size=4, unique=True))
            cache.select(stay)
            naive.rows = [naive.rows[b] for b in stay]
    one_pass(cache, naive, 2, generator)


def test_a_pass_that_is_not_committed_leaves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    cache, naive = KeyValueCache(2, 8), Naive(2)
    keys, values = one_pass(cache, naive, 3, generator)
    cache.keep(torch.tensor([[0, 1, 2]] * 2), [3, 2])
    naive.commit(keys, values, [[0, 1, 2], [0, 1]])
    one_pass(cache, naive, 4, generator)
    cache.keep(torch.zeros((2, 1), dtype=torch.int64), [0, 0])
    one_pass(cache, naive, 1, generator)


def test_room_is_made_once_not_every_round() -> None:
    generator = torch.Generator().manual_seed(0)
    cache, naive = KeyValueCache(1, 4), Naive(1)
    capacities = set()
    for _ in range(40):
        keys, values = one_pass(cache, naive, 2, generator)
        cache.keep(torch.tensor([[1]]), [1])
        naive.commit(keys, values, [[1]])
        capacities.add(cache.capacity)
    assert capacities == {4, 8, 16, 32, 64}


@pytest.mark.parametrize("lengths", [[2, 2], [3, 1]])
def test_the_span_is_the_longest_sequence_and_the_pass(lengths: list[int]) -> None:
    cache = KeyValueCache(2, 16)
    cache.lengths = list(lengths)
    cache.expect(5, CPU)
    assert cache.span == max(lengths) + 5
    assert cache.get_seq_length() == max(lengths)
