"""Keyed draws against splitmix64 in Python's whole numbers, and their statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from draftsmith.foundation import seeding

WORD = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def reference_uniform(key: int, n: int) -> list[float]:
    start = mix(key & WORD)
    return [((mix((start + i * 0x9E3779B97F4A7C15) & WORD) >> 12) + 0.5) / 2**52 for i in range(1, n + 1)]


def test_the_reference_is_splitmix64() -> None:
    # the published first outputs of splitmix64 for seed 1234567 (Rosetta Code)
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_uniform_equals_whole_number_arithmetic(shape: tuple[int, ...]) -> None:
    edges = [0, 1, -1, 2**63 - 1, -(2**63), 123456789, seeding.key("a")]
    size = math.prod(shape)
    keys = torch.tensor(edges[-size:] if shape == () else edges[:size]).reshape(shape)
    drawn = seeding.uniform(keys, 5)
    assert drawn.shape == (*shape, 5)
    assert drawn.dtype == torch.float64
    expected = [reference_uniform(int(k), 5) for k in keys.reshape(-1)]
    assert drawn.reshape(-1, 5).tolist() == expected


def test_uniform_leaves_its_keys_alone() -> None:
    keys = torch.tensor([5, 6])
    seeding.uniform(keys, 2)
    assert keys.tolist() == [5, 6]


@pytest.mark.parametrize("axis", ["one key, many draws", "many keys, one draw"])
def test_uniform_is_uniform(axis: str) -> None:
    n, bins = 200_000, 100
    if axis == "one key, many draws":
        u = seeding.uniform(torch.tensor(seeding.key("test")), n)
    else:
        u = seeding.uniform(torch.arange(n), 1)[:, 0]
    assert 0 < float(u.min()) < float(u.max()) < 1
    counts = torch.histc(u, bins, 0, 1)
    chi2 = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi2 - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    neighbours = float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_extreme_bits_stay_inside_the_open_interval() -> None:
    largest = torch.tensor([-1, 0])  # all bits set, no bits set, after the mixing
    bits = seeding._shift_right(largest.clone(), 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    assert bits.tolist() == [1 - 2.0**-53, 2.0**-53]


def test_keys_are_stable_and_tell_their_parts_apart() -> None:
    assert seeding.key("draftsmith", 1) == 5491910038236893628  # printf 's10:draftsmithi1:1' | b2sum -l 64, halved
    different = [("ab",), ("a", "b"), ("b", "a"), (1,), ("1",), (1, 2), (12,), (), ("",), ("i1:1",), (-1,)]
    keys = {seeding.key(*parts) for parts in different}
    assert len(keys) == len(different)
    assert all(0 <= key < 2**63 for key in keys)


def test_position_keys_depend_on_their_own_row_and_position_only() -> None:
    positions = torch.tensor([[0, 1, 2], [1, 7, 0]])
    both = seeding.position_keys(3, ["x", 9], positions, "target")
    assert torch.equal(both[1:], seeding.position_keys(3, [9], positions[1:], "target"))
    reordered = seeding.position_keys(3, ["x"], torch.tensor([[2, 0]]), "target")
    assert reordered.tolist() == [[int(both[0, 2]), int(both[0, 0])]]


def test_streams_differ_by_seed_request_position_and_purpose() -> None:
    positions = torch.arange(500)[None]
    streams = [
        seeding.position_keys(seed, [request], positions, purpose)[0]
        for seed, request, purpose in itertools.product((0, 1), ("a", 0, 1), ("target", "draft", "accept"))
    ]
    everything = torch.cat(streams)
    assert everything.unique().numel() == everything.numel()
    drawn = torch.stack([seeding.uniform(stream, 1)[:, 0] for stream in streams])
    correlation = torch.corrcoef(drawn) - torch.eye(len(streams))
    assert float(correlation.abs().max()) < 5 / math.sqrt(500)


def test_position_keys_refuse_a_wrong_number_of_requests() -> None:
    with pytest.raises(ValueError, match="2 requests for 1 rows"):
        seeding.position_keys(0, [1, 2], torch.zeros(1, 3, dtype=torch.int64), "target")


def test_shuffled_is_a_keyed_permutation() -> None:
    order = seeding.shuffled(1000, "epoch", 1)
    assert sorted(order) == list(range(1000))
    assert order == seeding.shuffled(1000, "epoch", 1)
    assert order != seeding.shuffled(1000, "epoch", 2)
    assert seeding.shuffled(0, "epoch") == []
    firsts = {seeding.shuffled(5, seed)[0] for seed in range(60)}
    assert firsts == {0, 1, 2, 3, 4}
