"""The AdaSPEC study's tables on hand-made rows: α and its pairing, accountings, verdicts, the paper's figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from draftsmith.evaluation.statistics import hierarchical_bootstrap
from draftsmith.studies import adaspec_results as results
from draftsmith.studies.drafts import METHODS, canonical
from draftsmith.studies.rows import Row
from tests.unit.studies.rows import row


def made(method: str = "distillspec", **changed: Any) -> Row:
    """A row of four answers whose draft is accepted more often the larger `gain`."""
    gain = changed.pop("gain", 0)
    extra = {"loss": METHODS[method].loss or "forward-kl", "drafter": "standalone", **changed.pop("extra", {})}
    numbers = dict.fromkeys(("draft_passes", "draft_tokens", "target_texts", "target_tokens", "work"), 100)
    zero = dict.fromkeys(
        ("reference_passes", "reference_tokens", "judged_passes", "judged_tokens", "written_tokens"), 0
    )
    rounds = (10, 12, 9, 11)
    return row(
        **{
            "study": "adaspec",
            "method": method,
            "keep": 0.4 if METHODS[method].keeps_share else 1.0,
            "growth": "chain",
            "node_budget": 4,
            "rounds": rounds,
            "committed": tuple(n + 6 + i % 2 + gain for i, n in enumerate(rounds)),
            "rejected": (8, 9, 9, 8),
            "extra": {**numbers, **zero, "training_work": 50, **extra},
            **changed,
        }
    )


def test_alpha_is_accepted_over_accepted_and_rejected_paired_by_seed_and_answer() -> None:
    mine = [made("adaspec", seed=s, gain=s + 1) for s in range(2)]
    plain = [made(seed=s) for s in (1, 0)]
    found = results.alpha(mine)
    accepted = sum(sum(r.committed) - sum(r.rounds) for r in mine)
    assert found is not None
    assert found.estimate == pytest.approx(accepted / (accepted + 2 * 34))
    gain = results.alpha_gain(mine, plain)
    cells = []
    for seed in range(2):
        pairs = zip(
            mine[seed].rejected, mine[seed].committed, plain[1 - seed].committed, mine[seed].rounds, strict=True
        )
        cells.append([[a - n, a - n + r, b - n, b - n + r] for r, a, b, n in pairs])
    direct = hierarchical_bootstrap(np.asarray(cells, float), lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3])
    assert gain is not None
    assert (gain.estimate, gain.low, gain.high) == pytest.approx((direct.estimate, direct.low, direct.high))
    assert results.alpha([]) is None
    assert results.alpha_gain(mine, []) is None


def test_an_accounting_takes_what_was_trained_for_it_and_what_trains_the_same() -> None:
    rows = [
        made(accounting="equal-epochs"),
        made(accounting="equal-cost"),
        made("adaspec"),
        made("adaspec", accounting="equal-tokens"),
        made("overlap", accounting="equal-cost"),
        made("adaspec-overlap", accounting="equal-cost"),
    ]
    names = {a: sorted((r.method, r.accounting) for r in results.at(rows, a)) for a in results.ACCOUNTINGS}
    assert names["equal-epochs"] == [("adaspec", "equal-epochs"), ("distillspec", "equal-epochs")]
    assert names["equal-tokens"] == [("adaspec", "equal-tokens"), ("distillspec", "equal-epochs")]
    assert names["equal-cost"] == [
        ("adaspec", "equal-epochs"),
        ("adaspec-overlap", "equal-cost"),
        ("distillspec", "equal-cost"),
        ("overlap", "equal-cost"),
    ]
    assert canonical("adaspec", "equal-cost", "tv") == "equal-cost", "the loss that chooses is a second one"


def test_a_verdict_counts_domains_whose_interval_excludes_zero() -> None:
    rows = []
    for domain, gain in (("math", 9), ("chat", 0), ("code", -5)):
        for seed in range(2):
            place = {"domain": domain, "benchmark": domain, "seed": seed}
            rows += [made(accounting="equal-cost", **place), made(**place), made("adaspec", gain=gain, **place)]
    (verdict,) = [t for t in results.tables(rows) if t.title == "Better at equal cost?"]
    assert [list(line) for line in verdict.rows] == [["adaspec", "1 math", "1 code", "1 chat"]]


def test_the_paper_stands_beside_ours_and_costs_add_up_over_domains() -> None:
    rows = []
    for domain in ("math", "chat"):
        for seed in range(2):
            place = {"domain": domain, "benchmark": domain, "seed": seed}
            rows += [
                made(**place),
                made("adaspec", gain=2, extra={"reference_tokens": 70, "training_work": 110}, **place),
            ]
            rows += [made("adaspec-least", gain=-2, **place)]
    tables = {t.title: t for t in results.tables(rows)}
    main = tables["Acceptance at equal epochs, T=0"]
    line = next(x for x in main.rows if x[0] == "adaspec")
    assert "62.63 / 82.79 (GSM8K)" in line
    assert "47.25 / 58.80 (Alpaca)" in line
    cost = tables["What training cost"]
    found = dict(zip(cost.columns, next(x for x in cost.rows if x[0] == "adaspec"), strict=True))
    assert found["training ÷ DistillSpec's"] == "2.20×"
    assert found["with the target's"] == "1.00×"
    assert "140" in next(x for x in cost.rows if x[0] == "adaspec"), "two domains of 70"
    least = tables["The 40% of largest and of smallest ΔL (equal epochs, T=0)"]
    assert [x[0] for x in least.rows] == ["DistillSpec", "adaspec", "adaspec-least"]
    assert least.rows[2][4] == "49.03"
    assert results.tables([]) == []
    assert results.figures([]) == []


def test_shares_and_divergences_are_compared_with_distillspec() -> None:
    rows = [made(seed=s) for s in range(2)]
    for k, gain in ((0.2, 1), (0.4, 3), (0.8, 2)):
        rows += [made("adaspec", keep=k, gain=gain, seed=s) for s in range(2)]
    rows += [made("adaspec", gain=-3, extra={"loss": "tv"}, seed=s) for s in range(2)]
    tables = {t.title.partition(" (")[0]: t for t in results.tables(rows)}
    assert [x[0] for x in tables["The share k that is kept"].rows] == ["DistillSpec", "k = 0.2", "k = 0.4", "k = 0.8"]
    losses = tables["The divergence that is trained"]
    assert {x[0]: x[-1] for x in losses.rows}["adaspec, tv"] == "9.09"
    main = tables["Acceptance at equal epochs, T=0"]
    assert [x[:2] for x in main.rows] == [["distillspec", "–"], ["adaspec", "0.4"]], "the paper's k alone"
    assert {d.name for d in results.figures(rows)} == {"cost-0", "share"}
