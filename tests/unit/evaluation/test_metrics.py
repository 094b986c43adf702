"""Every metric of a trace written by hand, worked out by hand."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from tests.unit.evaluation.hand_trace import FIRST, PLAIN, SECOND, SPECULATIVE, THIRD, a_round

from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import metrics
from draftsmith.evaluation.metrics import Counts


def test_counts_by_hand() -> None:
    assert metrics.count(SPECULATIVE) == Counts(
        rounds=5,
        committed=12,
        kept=10,
        accepted_at_depth=(3, 3, 1),
        offered_at_depth=(4, 3, 2),
        drafted=15,
        draft_ms=9.0,
        verify_ms=30.0,
        rest_ms=5.0,
        answers=3,
        answers_with_rounds=2,
        tokens=13,
        prefill_ms=75.0,
        total_ms=120.0,
    )


def test_counts_add_up_over_any_split() -> None:
    # all times are small multiples of 1/2, so that sums are exact in any order
    whole = metrics.count(SPECULATIVE)
    assert metrics.count([FIRST]) + metrics.count([SECOND, THIRD]) == whole
    assert metrics.count([THIRD]) + metrics.count([SECOND]) + metrics.count([FIRST]) == whole
    assert whole + Counts() == whole


def test_definitions_by_hand() -> None:
    counts = metrics.count(SPECULATIVE)
    assert counts.acceptance_length == 12 / 5
    assert counts.acceptance_length_after_cut == 10 / 5
    assert counts.acceptance_by_depth == [3 / 4, 3 / 3, 1 / 2]
    assert counts.accepted == 7
    assert counts.tokens_per_second == pytest.approx(13 / 0.120)
    assert counts.milliseconds_per_round == 9.0  # (120 - 75) / 5
    assert counts.split_per_round == pytest.approx(
        (1.8, 6.0, 1.2)
    )  # 45 - 9 - 30 = 6 ms of rest: 1 more than the rounds knew of
    assert sum(counts.split_per_round) == pytest.approx(counts.milliseconds_per_round)


def test_speed_by_hand() -> None:
    counts, plain = metrics.count(SPECULATIVE), metrics.count(PLAIN)
    assert plain.milliseconds_per_token == 8.0  # (155 - 75) / (13 - 3)
    assert metrics.round_cost(counts, plain) == 9 / 8
    assert metrics.speedup(counts, plain) == pytest.approx(155 / 120)


def test_conversions_by_hand() -> None:
    counts = metrics.count(SPECULATIVE)
    assert metrics.vllm(counts) == {
        "mean_acceptance_length": 1 + 7 / 5,
        "draft_acceptance_rate": 7 / 15,
        "per_position_acceptance_rate": [3 / 5, 3 / 5, 1 / 5],
    }
    assert metrics.sglang(counts) == 13 / 5
    assert metrics.eagle(counts) == 12 / (2 + 1)  # idx ends at 2 and at 1
    assert metrics.sfdd(counts) == pytest.approx(7 / 5)
    assert metrics.sfdd(counts, by_idx=True) == 12 / (2 + 1) - 1
    assert metrics.adaspec(counts) == 7 / (7 + 2)  # refused at depth 1, and at depth 3
    assert metrics.specforge(counts.acceptance_by_depth) == pytest.approx(3 / 4 + 3 / 4 + 3 / 8)
    assert metrics.hass(SPECULATIVE) == pytest.approx((7 / 3 + 5 / 2) / 2)


def test_eagle_conversion_gives_back_a_published_correction() -> None:
    # papers.md 3.4: TAPS' SVAMP figure 4.527 is 4.372 with each answer's missing round counted (29.2 rounds an answer)
    true = Counts(rounds=12_800, committed=55_962, answers=438, answers_with_rounds=438)
    assert true.acceptance_length == pytest.approx(4.372, abs=1e-3)
    assert metrics.eagle(true) == pytest.approx(4.527, abs=1e-3)


def test_owners_and_contexts() -> None:
    owners = metrics.by_owner(SPECULATIVE, drafters=3)
    assert owners == [[2, 1, 0], [1, 2, 1], [0, 0, 0]]
    assert tuple(map(sum, zip(*owners, strict=True))) == metrics.count(SPECULATIVE).accepted_at_depth
    buckets = metrics.by_context(SPECULATIVE, [0, 14, 256, 1024])
    assert {span: c.rounds for span, c in buckets.items()} == {(0, 14): 2, (14, 256): 1, (256, 1024): 2}
    assert buckets[(0, 14)].acceptance_length == 2.0
    assert buckets[(256, 1024)].acceptance_length == 2.5
    assert buckets[(256, 1024)].milliseconds_per_round == (10 + 7) / 2
    assert list(metrics.by_context(SPECULATIVE, [0, 20])) == [(0, 20), (20, None)]
    with pytest.raises(ValueError, match="increase"):
        metrics.by_context(SPECULATIVE, [5, 5])


def naive_loops(ids: list[int]) -> bool:
    return any(sum(ids[j : j + 8] == ids[i : i + 8] for j in range(len(ids) - 7)) >= 3 for i in range(len(ids) - 7))


def test_loops() -> None:
    gram = [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics.loops(gram * 3)
    assert not metrics.loops(gram * 2 + gram[:7])
    assert metrics.loops([*gram, 90, *gram, 91, 92, *gram])
    assert metrics.loops([7] * 10)
    assert not metrics.loops([7] * 9)
    assert not metrics.loops([])
    assert not metrics.loops(list(range(500)))
    rng = random.Random(0)
    cases = [[rng.randrange(2) for _ in range(n)] for n in range(60)]
    expected = [naive_loops(ids) for ids in cases]
    assert any(expected)
    assert not all(expected[20:])
    assert [metrics.loops(ids) for ids in cases] == expected


def test_without_loops_leaves_the_loop_out() -> None:
    looping = Generation(
        request=4, token_ids=[1, 2] * 20, finish="length", rounds=[a_round(4, 3, 3, (0, 0, 0), 4, 9, 1.0, 1.0)] * 10
    )
    kept = metrics.without_loops([FIRST, looping])
    assert kept == [FIRST]
    assert metrics.count([FIRST, looping]).acceptance_length > metrics.count(kept).acceptance_length


def test_nothing_counted_is_not_a_number() -> None:
    nothing = Counts()
    assert math.isnan(nothing.acceptance_length)
    assert math.isnan(nothing.tokens_per_second)
    assert math.isnan(metrics.hass([THIRD]))
    assert nothing.acceptance_by_depth == []


def test_offers_never_exceed_the_acceptances_above() -> None:
    counts = metrics.count(SPECULATIVE)
    assert counts.offered_at_depth[0] <= counts.rounds
    assert all(offered <= accepted for accepted, offered in pairwise_of(counts))


def pairwise_of(counts: Counts) -> list[tuple[int, int]]:
    return [(a, o) for (a, _), (_, o) in pairwise(zip(counts.accepted_at_depth, counts.offered_at_depth, strict=True))]
