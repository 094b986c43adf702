"""Distribution numerics against naive float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.numerics import distributions
from draftsmith.numerics.distributions import (
    TokenStatistics,
    energy,
    entropy,
    flatness,
    log_norm,
    log_z,
    margin,
    negative_log_likelihood,
    overlap,
    statistics,
    top1,
    total_variation,
)

Array = npt.NDArray[np.float64]

SIZES = (2, 3, 100, 257, 4_099, 49_152, 150_000)
SCALES = (0.01, 0.3, 1.0, 10.0, 100.0)


def logits_of(size: int, scale: float, rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(logits: Tensor) -> Array:
    z = logits.double().numpy()
    exps: Array = np.exp(z - z.max(-1, keepdims=True))
    p: Array = exps / exps.sum(-1, keepdims=True)
    return p


def naive_cosine(logits: Tensor) -> Array:
    p = probabilities(logits)
    u = np.full_like(p, 1.0 / p.shape[-1])
    cosine: Array = (p * u).sum(-1) / (np.sqrt((p * p).sum(-1)) * np.sqrt((u * u).sum(-1)))
    return cosine


def naive(logits: Tensor, next_tokens: Tensor) -> dict[str, Array]:
    z, p = logits.double().numpy(), probabilities(logits)
    ordered = np.sort(p, -1)
    log_p = np.log(np.maximum(p, 1e-320))
    likelihoods = np.take_along_axis(z, next_tokens.numpy()[:, None], -1)[:, 0]
    totals = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    return {
        "log_z": totals,
        "log_norm": 0.5 * np.log((p * p).sum(-1)),
        "entropy": -(p * log_p).sum(-1),
        "top1": ordered[:, -1],
        "margin": ordered[:, -1] - ordered[:, -2],
        "nll": totals - likelihoods,
        "argmax": z.argmax(-1),
        "flatness": naive_cosine(logits),
        "energy": -totals,
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_flatness_is_the_naive_cosine_to_one_in_a_million(size: int, scale: float) -> None:
    logits = logits_of(size, scale)
    want = naive_cosine(logits)
    np.testing.assert_allclose(flatness(logits).numpy(), want, rtol=1e-6)
    streamed = statistics(logits, lambda rows: rows, torch.zeros(3, dtype=torch.int64))
    np.testing.assert_allclose(streamed.flatness.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_the_other_statistics_are_the_naive_ones(size: int, scale: float) -> None:
    logits = logits_of(size, scale, seed=1)
    tokens = torch.tensor([0, size // 2, size - 1])
    want = naive(logits, tokens)
    alone = {
        "log_z": log_z(logits),
        "log_norm": log_norm(logits),
        "entropy": entropy(logits),
        "top1": top1(logits),
        "margin": margin(logits),
        "nll": negative_log_likelihood(logits, tokens),
        "energy": energy(logits),
    }
    streamed = statistics(logits, lambda rows: rows, tokens)
    for name in alone:
        for got in (alone[name], getattr(streamed, name)):
            np.testing.assert_allclose(got.numpy(), want[name], rtol=2e-6, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(streamed.argmax.numpy(), want["argmax"])


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 600),
    scale=st.floats(0.01, 100.0),
    offset=st.floats(-500.0, 500.0),
    seed=st.integers(0, 2**31),
)
def test_bounds_shift_and_permutation(size: int, scale: float, offset: float, seed: int) -> None:
    logits = logits_of(size, scale, rows=2, seed=seed).double()
    flat = flatness(logits)
    assert (flat >= 1 / math.sqrt(size)).all()
    assert (flat <= 1).all()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    for score in (flatness, entropy, top1, margin, log_norm):
        want = score(logits)
        torch.testing.assert_close(score(logits[:, order]), want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score(logits + offset), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [2, 1000, 150_000])
def test_one_hot_and_uniform(size: int) -> None:
    one_hot = torch.full((1, size), -1e4)
    one_hot[0, size // 3] = 0.0
    uniform = torch.full((1, size), 7.5)
    both = torch.cat([one_hot, uniform])
    streamed = statistics(both, lambda rows: rows, torch.tensor([size // 3, 0]))
    for flat in (flatness(both), streamed.flatness):
        np.testing.assert_allclose(flat.numpy(), [1 / math.sqrt(size), 1.0], rtol=1e-6)
    np.testing.assert_allclose(streamed.entropy.numpy(), [0.0, math.log(size)], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(streamed.top1.numpy(), [1.0, 1 / size], rtol=1e-6)
    np.testing.assert_allclose(streamed.margin.numpy(), [1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(streamed.nll.numpy(), [0.0, math.log(size)], atol=1e-6, rtol=1e-6)
    assert streamed.argmax.tolist() == [size // 3, 0]


def test_bfloat16_logits_are_widened_before_anything_is_computed() -> None:
    logits = logits_of(5_000, 3.0).bfloat16()
    np.testing.assert_allclose(flatness(logits).numpy(), naive_cosine(logits.float()), rtol=1e-6)
    streamed = statistics(logits, lambda rows: rows, torch.zeros(3, dtype=torch.int64))
    np.testing.assert_allclose(streamed.flatness.numpy(), naive_cosine(logits.float()), rtol=1e-6)
    assert streamed.log_z.dtype == torch.float32
    assert streamed.argmax.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 5, 256, 257, 300, 1024])
def test_ties_take_the_lowest_id_and_have_no_margin(size: int) -> None:
    logits = torch.zeros(size, size)  # row i: the largest logit twice, at i and at the end
    rows = torch.arange(size)
    logits[rows, rows] = 3.0
    logits[:, -1] = 3.0
    streamed = statistics(logits, lambda block: block, rows)
    assert streamed.argmax.tolist() == logits.argmax(-1).tolist() == list(range(size))
    want = torch.zeros(size)
    want[-1] = margin(logits[-1:])[0]
    torch.testing.assert_close(streamed.margin, want)
    torch.testing.assert_close(margin(logits), want)


def test_the_second_largest_is_found_in_any_chunk() -> None:
    size = 1000
    places = [(first, second) for first in (0, 255, 256, 511, 999) for second in (1, 254, 257, 700, 998)]
    logits = torch.zeros(len(places), size)
    for row, (first, second) in enumerate(places):
        logits[row, first], logits[row, second] = 6.0, 5.0
    streamed = statistics(logits, lambda block: block, torch.zeros(len(places), dtype=torch.int64))
    total = math.exp(6) + math.exp(5) + size - 2
    np.testing.assert_allclose(streamed.margin.numpy(), (math.exp(6) - math.exp(5)) / total, rtol=1e-6)


def test_a_token_ruled_out_by_minus_infinity_counts_nothing() -> None:
    logits = logits_of(700, 2.0, rows=4)
    ruled_out = torch.cat([logits, torch.full((4, 30), -torch.inf)], dim=1)
    ruled_out[3, :] = torch.cat([logits[3], torch.full((30,), -60.0)])
    tokens = torch.tensor([1, 2, 3, 4])
    got, want = (statistics(z, lambda block: block, tokens) for z in (ruled_out, logits))
    for name in ("log_z", "log_norm", "entropy", "top1", "margin", "nll", "argmax"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    torch.testing.assert_close(entropy(ruled_out), entropy(logits))


def test_blocks_change_nothing_and_stay_bounded() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(101, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    tokens = torch.randint(0, 300, (101,), generator=generator)
    seen: list[int] = []

    def project(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return rows @ weight.T

    whole = statistics(hidden, project, tokens, block_rows=101)
    assert seen == [101]
    seen.clear()
    small = statistics(hidden, project, tokens, block_rows=7)
    assert max(seen) == 7
    assert sum(seen) == 101
    seen.clear()
    by_bytes = statistics(hidden, project, tokens, block_bytes=40 * 300 * 4)
    assert max(seen) == 40
    assert sum(seen) == 101
    for name in ("log_z", "log_norm", "entropy", "top1", "margin", "nll", "argmax"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name))
        torch.testing.assert_close(getattr(by_bytes, name), getattr(whole, name))


def test_statistics_keep_no_gradient_and_leave_the_logits_alone() -> None:
    logits = logits_of(50, 1.0).requires_grad_()
    before = logits.detach().clone()
    assert not statistics(logits, lambda rows: rows, torch.zeros(3, dtype=torch.int64)).log_z.requires_grad
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_no_rows_and_wrong_rows() -> None:
    empty = statistics(torch.empty(0, 8), lambda rows: rows, torch.empty(0, dtype=torch.int64))
    assert len(empty) == 0
    assert empty.vocab_size == 8
    with pytest.raises(ValueError, match=r"next_tokens must be \[3\]"):
        statistics(logits_of(8, 1.0), lambda rows: rows, torch.zeros(2, dtype=torch.int64))


def test_columns_travel_through_a_file_rows_and_joining() -> None:
    logits = logits_of(20, 1.0, rows=6)
    whole = statistics(logits, lambda rows: rows, torch.arange(6))
    parts = [whole.rows(slice(0, 2)), whole.rows(torch.tensor([2, 3, 4])), whole.rows(torch.arange(6) == 5)]
    joined = TokenStatistics.joined(parts)
    again = TokenStatistics(**joined.tensors(), vocab_size=20)
    torch.testing.assert_close(again.tensors(), whole.tensors(), rtol=0, atol=0)
    other = statistics(logits[:, :10], lambda rows: rows, torch.arange(6))
    with pytest.raises(ValueError, match="different vocabularies"):
        TokenStatistics.joined([whole, other])


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 200), scale=st.floats(0.01, 30.0), seed=st.integers(0, 2**31))
def test_overlap_is_the_sum_of_minima(size: int, scale: float, seed: int) -> None:
    p_log = logits_of(size, scale, seed=seed).double().log_softmax(-1)
    q_log = logits_of(size, scale, seed=seed + 1).double().log_softmax(-1)
    p, q = p_log.exp().numpy(), q_log.exp().numpy()
    np.testing.assert_allclose(overlap(p_log, q_log).numpy(), np.minimum(p, q).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(total_variation(p_log, q_log).numpy(), 0.5 * np.abs(p - q).sum(-1), atol=1e-9)
    torch.testing.assert_close(overlap(p_log, p_log), torch.ones(3, dtype=torch.float64))


def test_mass_outside_a_reduced_vocabulary_is_lost_overlap() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    inside = p[:2].log()  # the drafter cannot say token 2
    q_log = torch.tensor([0.6, 0.4]).log()
    assert overlap(inside, q_log).item() == pytest.approx(0.8)
    full_q = torch.tensor([0.6, 0.4, 0.0])
    assert total_variation(inside, q_log).item() == pytest.approx(0.5 * (p - full_q).abs().sum().item())


def test_a_tile_holds_less_than_a_block() -> None:
    # the loop over tiles is what production sizes go through: make sure that this file does, too
    assert distributions.rows_that_fit(distributions.CPU_TILE_BYTES, 150_000) < 3


def test_expected_counts_are_the_weighted_sum_of_the_distributions() -> None:
    torch.manual_seed(5)
    hidden, weight = torch.randn(37, 8, dtype=torch.float64), torch.randn(301, 8, dtype=torch.float64)
    weights = (torch.arange(37) % 3 == 0).float()
    total = torch.full((301,), 2.0)
    statistics(
        hidden.float(),
        lambda h: h @ weight.float().T,
        torch.zeros(37, dtype=torch.int64),
        block_rows=10,
        expected=(weights, total),
    )
    naive = 2.0 + (torch.softmax(hidden @ weight.T, -1) * weights.double()[:, None]).sum(0)
    torch.testing.assert_close(total.double(), naive, rtol=1e-5, atol=1e-6)
