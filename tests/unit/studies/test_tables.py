"""Tables on hand-made rows: pairing, ratios, costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from draftsmith.evaluation.statistics import Interval, hierarchical_bootstrap
from draftsmith.studies import sfdd_results, tables
from draftsmith.studies.tables import Table
from tests.unit.studies.rows import row


def test_acceptance_is_a_micro_average_over_seeds_and_benchmarks() -> None:
    rows = [
        row(seed=0, benchmark="a", committed=(10, 6), rounds=(5, 4)),
        row(seed=0, benchmark="b", committed=(8,), rounds=(2,)),
        row(seed=1, benchmark="a", committed=(11, 9), rounds=(4, 5)),
        row(seed=1, benchmark="b", committed=(7,), rounds=(3,)),
    ]
    found = tables.acceptance(rows)
    assert found is not None
    assert found.estimate == pytest.approx((10 + 6 + 8 + 11 + 9 + 7) / (5 + 4 + 2 + 4 + 5 + 3))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.estimate < found.high


def test_relative_pairs_seeds_and_answers_whatever_their_order() -> None:
    mine = [
        row(seed=0, prompts=("p", "q", "r"), committed=(10, 6, 99), rounds=(5, 4, 9)),
        row(seed=1, prompts=("q", "p"), committed=(9, 11), rounds=(5, 4)),
        row(seed=2, prompts=("p", "q"), committed=(50, 50), rounds=(1, 1)),
    ]
    other = [
        row(seed=1, prompts=("p", "q", "s"), committed=(8, 7, 99), rounds=(4, 5, 1)),
        row(seed=0, prompts=("q", "p"), committed=(5, 8), rounds=(4, 5)),
    ]
    found = tables.relative(mine, other)
    # r and s stand on one side only, and so does seed 2
    expected = np.array([[[10, 5, 8, 5], [6, 4, 5, 4]], [[11, 4, 8, 4], [9, 5, 7, 5]]], float)
    sums = expected.sum(axis=(0, 1))
    direct = hierarchical_bootstrap(expected, lambda s: np.log(s[..., 0] / s[..., 1] / (s[..., 2] / s[..., 3])))
    assert found is not None
    assert found.estimate == pytest.approx(sums[0] / sums[1] / (sums[2] / sums[3]))
    assert (found.low, found.high) == pytest.approx((math.exp(direct.low or 0), math.exp(direct.high or 0)))


def test_answers_of_one_token_and_empty_sides_have_no_ratio() -> None:
    assert tables.relative([row()], []) is None
    assert tables.acceptance([]) is None
    assert tables.acceptance([row(committed=(0, 0), rounds=(0, 0))]) is None
    one = tables.acceptance([row(committed=(6, 0), rounds=(3, 0))])
    assert one == Interval(2.0, None, None)


def test_a_method_against_itself_is_equal() -> None:
    rows = [row(seed=s, committed=(9 + s, 5), rounds=(4, 3)) for s in range(3)]
    found = tables.relative(rows, rows)
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-9)


def test_costs_charge_the_target_s_pass_and_a_scout() -> None:
    rows = [
        row(seed=0, training_positions=1000, target_positions=400, pass_ratio=0.5, scout_positions=30),
        row(seed=0, benchmark="b", training_positions=1000, target_positions=400, pass_ratio=0.5, scout_positions=30),
        row(seed=1, training_positions=1200, target_positions=400, pass_ratio=0.5, scout_positions=30),
    ]
    # a seed counts once, however many benchmarks it has
    assert tables.cost(rows, charge=False) == 1100
    assert tables.cost(rows) == 1100 + 30 + 200
    assert tables.cost([]) is None
    assert tables.seconds([row(seed=0, training_seconds=5.0), row(seed=1, training_seconds=9.0)]) == 7


def test_text_of_intervals() -> None:
    assert tables.shown(Interval(2.5, 2.25, 2.75)) == "2.500 [2.250, 2.750]"
    assert tables.shown(Interval(2.5, None, None)) == "2.500"
    assert tables.shown(None) == "–"
    assert tables.percent(Interval(1.029, 1.004, 1.0551), less=1) == "+2.9 % [+0.4, +5.5]"
    assert tables.percent(Interval(0.942, None, None)) == "94.2 %"


def test_markdown() -> None:
    table = Table("Costs", ["method", "τ"], [["full", "2.0"], ["random", "1.9"]], "Seconds.")
    assert table.markdown() == (
        "## Costs\n\nSeconds.\n\n| method | τ |\n| --- | --: |\n| full | 2.0 |\n| random | 1.9 |\n"
    )


def cells() -> list[object]:
    common = {"pass_ratio": 0.5, "training_steps": 5}
    out = []
    for seed in (0, 1):
        for t in (0.0, 1.0):
            shared = {**common, "seed": seed, "temperature": t}
            out += [
                row(method="full", keep=1.0, committed=(20, 10), rounds=(8, 4), training_positions=2000,
                    target_positions=1000, **shared),
                row(method="random", committed=(18, 9), rounds=(8, 4), training_positions=1000, target_positions=500,
                    **shared),
                row(method="flatness", committed=(19, 9.0), rounds=(8, 4), training_positions=900,
                    scored_positions=1000, target_positions=1000, **shared),
            ]  # fmt: skip
    return out


def test_the_study_s_tables_on_rows_made_by_hand() -> None:
    acceptance, benchmarks, cost = sfdd_results.tables(cells())  # type: ignore[arg-type]
    flat = dict(zip(acceptance.columns, acceptance.rows[2], strict=False))
    assert acceptance.title == "Acceptance length: 50% of the samples, equal epochs"
    assert [line[0] for line in acceptance.rows] == ["full", "random", "flatness"]
    assert flat["seeds"] == "2"
    assert flat["τ, T=0"].startswith(f"{28 / 12:.3f}")
    assert flat["of full"].startswith(f"{100 * 28 / 30:.1f} %")
    assert flat["against random"].startswith(f"+{100 * (28 / 27 - 1):.1f} %")
    # the paper at T=1: (2.56 + 1) ÷ (2.78 + 1) and ÷ (2.46 + 1); T=1 stands in the last five columns
    assert acceptance.rows[2][-2:] == ["94.2 %", "+2.9 %"]
    assert acceptance.rows[2][5:7] == [f"{100 * 3.75 / 4:.1f} %", f"+{100 * (3.75 / 3.69 - 1):.1f} %"]
    assert benchmarks.columns == ["method", "gsm8k, T=0", "gsm8k, T=1"]
    assert benchmarks.rows[0][1] == "2.500"
    by_method = {line[0]: line for line in cost.rows}
    assert by_method["full"][3:5] == ["1.00×", "1.00×"]
    assert by_method["random"][3:6] == ["2.00×", "2.00×", "–"]
    # 2000 + 500 against 900 + 500 positions; scoring costs 500 of the 2000 of full training
    assert by_method["flatness"][3:6] == [f"{2000 / 900:.2f}×", f"{2500 / 1400:.2f}×", "25.0%"]
    assert by_method["flatness"][-1] == "2.02×"


def test_figures_of_whatever_rows_there_are() -> None:
    rows = cells()
    found = sfdd_results.figures(rows)  # type: ignore[arg-type]
    assert [plot.name for plot in found] == ["cost-0", "cost-1"]
    more = [*rows, *(r.model_copy(update={"keep": 0.3}) for r in rows if r.method != "full")]  # type: ignore[attr-defined]
    assert [plot.name for plot in sfdd_results.figures(more)] == ["cost-0", "share-0", "cost-1", "share-1"]
    assert sfdd_results.figures([]) == []
    assert sfdd_results.tables([]) == []
