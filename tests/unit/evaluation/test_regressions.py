"""A planted regression is named with its set and figure; what intervals leave open is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from draftsmith.evaluation.regressions import compare
from draftsmith.evaluation.statistics import ratio_interval
from draftsmith.evaluation.summary import Lossless, Result, Speedup
from draftsmith.foundation.errors import UserError


def a_result(
    tau: tuple[float, float | None, float | None] = (2.5, 2.4, 2.6),
    speedup: tuple[float, float | None, float | None] = (1.5, 1.4, 1.6),
    different: int = 0,
    name: str = "gsm8k",
) -> Result:
    return Result(
        set=name,
        temperature=0.0,
        drafters="eagle3",
        acceptance_length=tau[0],
        acceptance_length_low=tau[1],
        acceptance_length_high=tau[2],
        acceptance_by_depth=[0.6],
        round_cost=1.5,
        speedup=Speedup(estimate=speedup[0], low=speedup[1], high=speedup[2]),
        plain_tokens_per_second=20.0,
        tokens_per_second=30.0,
        lossless=Lossless(checked=8, equal=8 - different, near_ties=0),
    )


def test_nothing_changed() -> None:
    found = compare([a_result()], [a_result()])
    assert (found.worse, found.open, found.missing, found.compared) == ([], [], [], 1)


def test_better_is_no_regression() -> None:
    assert not compare([a_result((3.5, 3.4, 3.6), (2.5, 2.4, 2.6))], [a_result()]).worse


def test_acceptance_fell_beyond_the_intervals() -> None:
    (said,) = compare([a_result((2.2, 2.1, 2.3))], [a_result()]).worse
    assert said == "gsm8k, T = 0, eagle3: acceptance length fell from 2.500 (2.400–2.600) to 2.200 (2.100–2.300)"


def test_speed_fell_and_can_be_left_out() -> None:
    slower = a_result(speedup=(1.2, 1.1, 1.3))
    (said,) = compare([slower], [a_result()]).worse
    assert "speed-up fell from 1.500" in said
    assert not compare([slower], [a_result()], speed=False).worse


@pytest.mark.parametrize(("tau", "worse"), [(2.37, 0), (2.34, 1)])
def test_both_intervals_count(tau: float, worse: int) -> None:
    # by hand: reaches log(2.5/2.4) = .0408 and log(high/tau) ≈ .0408; together .0577, so below 2.5·e^-.0577 = 2.360
    now = a_result((tau, tau / 1.04167, tau * 1.04167))
    assert math.isclose(2.5 * math.exp(-math.hypot(math.log(2.5 / 2.4), math.log(1.04167))), 2.360, abs_tol=1e-3)
    assert len(compare([now], [a_result()]).worse) == worse


def test_answers_that_differ() -> None:
    (said,) = compare([a_result(different=2)], [a_result()]).worse
    assert "2 of 8 answers differ" in said
    assert not compare([a_result(different=2)], [a_result(different=2)]).worse


def test_one_prompt_is_left_open() -> None:
    found = compare([a_result((2.0, None, None))], [a_result((2.5, None, None))])
    assert not found.worse
    assert "one prompt allows no interval" in found.open[0]


def test_missing_and_nothing_in_common() -> None:
    found = compare([a_result()], [a_result(), a_result(name="svamp")])
    assert found.missing == ["svamp, T = 0, eagle3"]
    with pytest.raises(UserError, match="nothing to compare: .*svamp.*gsm8k"):
        compare([a_result()], [a_result(name="svamp")])


def test_false_alarms_are_rare_and_a_true_fall_is_seen() -> None:
    """Simulated: τ of 40 prompts, twice from one truth, and once from a truth that is 15 % lower."""
    generator = np.random.default_rng(3)

    def measured(level: float) -> Result:
        rounds = generator.integers(20, 60, 40)
        taus = level * np.exp(0.12 * generator.standard_normal(40))
        found = ratio_interval(list(rounds * taus), [float(r) for r in rounds])
        return a_result((found.estimate, found.low, found.high))

    alarms = sum(bool(compare([measured(2.5)], [measured(2.5)]).worse) for _ in range(100))
    seen = sum(bool(compare([measured(2.125)], [measured(2.5)]).worse) for _ in range(20))
    assert alarms <= 8  # about 2.5 expected: one side of 5 %
    assert seen == 20
