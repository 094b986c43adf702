"""Token weights against the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.selection.tokens import (
    NAMES,
    DeltaLoss,
    RowFacts,
    TokenWeights,
    by_name,
    chain_survival,
    flatness_weights,
    kept_count,
    largest,
    mask_weights,
    prefix_survival,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_weighs_every_row_the_same() -> None:
    assert by_name("uniform")(rand(5), RowFacts(), 0).tolist() == [1.0] * 5


def test_flatness_weights_have_mean_one_and_the_ratio_of_the_flatness() -> None:
    flat = rand(50) + 0.01
    weights = by_name("flatness")(rand(50), RowFacts(flatness=flat), 0)
    assert weights.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(weights[1:] / weights[0], flat[1:] / flat[0])
    sharper = flatness_weights(flat, power=2.0)
    torch.testing.assert_close(sharper[1:] / sharper[0], (flat[1:] / flat[0]) ** 2)
    torch.testing.assert_close(flatness_weights(flat, power=0.0), torch.ones(50))
    # with the corpus's mean a row's weight does not depend on its neighbours
    alone = torch.cat([flatness_weights(row, mean=0.5) for row in flat.split(7)])
    torch.testing.assert_close(alone, flat / 0.5)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 200), percent=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_the_mask_is_the_one_of_adaspec_s_code(n: int, percent: int, seed: int) -> None:
    delta = rand(n, seed=seed).double()
    want = delta.numpy() >= torch.quantile(delta, 1 - percent / 100).item() - 1e-12
    assert len(set(delta.tolist())) == n
    assert largest(delta, percent / 100).tolist() == want.tolist()
    assert kept_count(n, percent / 100) == want.sum()


def test_ties_keep_the_earlier_row_and_never_more_than_their_share() -> None:
    tied = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])
    assert kept_count(5, 0.4) == 2
    assert largest(tied, 0.4).tolist() == [True, True, False, False, False]
    many = largest(torch.zeros(10_000), 0.4)
    assert many.nonzero().squeeze(-1).tolist() == list(range(kept_count(10_000, 0.4)))
    assert kept_count(0, 0.4) == 0


def test_delta_loss_keeps_what_the_drafter_misses_and_the_reference_has() -> None:
    losses = torch.tensor([5.0, 5.0, 0.1, 2.0, 3.0])
    reference = torch.tensor([4.9, 1.0, 0.1, 1.9, 0.5])
    facts = RowFacts(reference_losses=reference)
    kept = by_name("delta-loss", fraction=0.4)(losses, facts, 0)
    torch.testing.assert_close(kept, torch.tensor([0.0, 2.5, 0.0, 0.0, 2.5]))
    # eq. 10: 1 / (k·|y|) · Σ over the kept, the mean over the kept; the trainer divides by all rows
    assert (kept * losses).mean().item() == pytest.approx((5.0 + 3.0) / 2)
    as_in_the_code = by_name("delta-loss", fraction=0.4, normalise="all")(losses, facts, 0)
    assert (as_in_the_code * losses).mean().item() == pytest.approx((5.0 + 3.0) / 5)


@pytest.mark.parametrize("normalise", ["kept", "all"])
def test_delta_loss_by_sample_keeps_a_share_of_each(normalise: str) -> None:
    samples = torch.tensor([7, 7, 7, 3, 3, 3, 3, 3, 3, 7])
    excess = rand(10)
    weights = by_name("delta-loss", fraction=0.5, scope="sample", normalise=normalise)(
        excess, RowFacts(reference_losses=torch.zeros(10), samples=samples), 0
    )
    for name in (3, 7):
        rows = (samples == name).nonzero().squeeze(-1)
        count = kept_count(len(rows), 0.5)
        best = set(rows[excess[rows].argsort(descending=True)[:count]].tolist())
        assert {int(row) for row in rows if weights[row] > 0} == best
        each = len(rows) / count if normalise == "kept" else 1.0
        torch.testing.assert_close(weights[sorted(best)], torch.full((count,), each))


def test_the_running_threshold_is_a_moving_average_for_each_step() -> None:
    weights = DeltaLoss(fraction=0.5, scope="running", normalise="all", momentum=0.5)
    facts = RowFacts(reference_losses=torch.zeros(3))
    assert weights(torch.tensor([1.0, 2.0, 3.0]), facts, 0).tolist() == [0, 1, 1]  # threshold 2
    assert weights(torch.tensor([2.0, 4.0, 6.0]), facts, 0).tolist() == [0, 1, 1]  # (2 + 4) / 2 = 3
    assert weights(torch.tensor([0.0, 0.0, 1.0]), facts, 0).tolist() == [0, 0, 0]  # (3 + 0) / 2
    assert weights.thresholds == {0: 1.5}
    assert weights(torch.tensor([0.0, 0.5, 1.0]), facts, 1).tolist() == [0, 1, 1]  # another step, another threshold
    resumed = DeltaLoss(fraction=0.5, scope="running", normalise="all", momentum=0.5, thresholds={0: 1.5})
    assert resumed(torch.tensor([1.5, 1.5, 1.0]), facts, 0).tolist() == [1, 1, 0]


def test_nothing_kept_weighs_nothing() -> None:
    assert mask_weights(torch.zeros(3, dtype=torch.bool), "kept").tolist() == [0.0, 0.0, 0.0]
    for scope in ("micro-batch", "sample", "running"):
        facts = RowFacts(reference_losses=torch.empty(0), samples=torch.empty(0, dtype=torch.int64))
        assert by_name("delta-loss", scope=scope)(torch.empty(0), facts, 0).shape == (0,)


def test_prefix_survival_is_the_product_of_the_acceptances_before() -> None:
    acceptances = torch.tensor([[0.9, 0.5, 0.2, 0.7], [0.0, 1.0, 1.0, 1.0]])
    want = torch.tensor([[1.0, 0.9, 0.45, 0.09], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(prefix_survival(acceptances), want)
    half = torch.tensor([1.0, 0.95, 0.95 * 0.75, 0.95 * 0.75 * 0.6])
    torch.testing.assert_close(prefix_survival(acceptances, smoothing=0.5)[0], half)
    assert by_name("prefix-survival")(rand(4), RowFacts(survival=want[0]), 2).tolist() == want[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_weights_carry_no_gradient_and_are_float32(name: str) -> None:
    losses = rand(6).double().requires_grad_()
    each = {
        field: rand(6, seed=i).double().requires_grad_() for i, field in enumerate(("flatness", "reference_losses"))
    }
    facts = RowFacts(samples=torch.tensor([0, 0, 1, 1, 1, 1]), survival=prefix_survival(losses), **each)
    weights = by_name(name)(losses, facts, 0)
    assert weights.shape == (6,)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad


def test_wrong_names_options_and_missing_facts_are_refused() -> None:
    with pytest.raises(UserError, match="no token weights are called 'delta'; did you mean 'delta-loss'"):
        by_name("delta")
    with pytest.raises(UserError, match="'flatness' have no option 'fraction'; known: power, mean"):
        by_name("flatness", fraction=0.4)
    with pytest.raises(UserError, match="'delta-loss' have no option 'thresholds'"):
        by_name("delta-loss", thresholds=None)
    for option, value in (
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("momentum", 1.0),
        ("scope", "row"),
        ("normalise", "k"),
    ):
        with pytest.raises(UserError, match=f"delta-loss: {option} must be"):
            by_name("delta-loss", **{option: value})
    cases: list[tuple[TokenWeights, str]] = [
        (by_name("flatness"), "flatness"),
        (by_name("delta-loss"), "reference_losses"),
        (by_name("prefix-survival"), "survival"),
    ]
    for weights, name in cases:
        with pytest.raises(UserError, match=f"need {name} of each row"):
            weights(rand(2), RowFacts(), 0)


@pytest.mark.parametrize("scope", ["micro-batch", "sample", "running"])
@pytest.mark.parametrize("normalise", ["kept", "all"])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75])
def test_delta_loss_equals_explicit_loops(scope: str, normalise: str, fraction: float) -> None:
    """AdaSPEC's rule spelled out row by row (eq. 7 to 10 and the authors' `utils.py`), over three micro-batches."""
    weights = DeltaLoss(fraction=fraction, scope=scope, normalise=normalise, momentum=0.8)  # type: ignore[arg-type]
    threshold: float | None = None
    for batch in range(3):
        losses, reference = rand(37, seed=batch), rand(37, seed=100 + batch)
        samples = torch.tensor([(7 * i + batch) % 4 for i in range(37)]).sort().values
        found = weights(losses, RowFacts(samples=samples, reference_losses=reference), 0)
        excess = [float(a) - float(b) for a, b in zip(losses, reference, strict=True)]
        groups = [list(range(37))]
        if scope == "sample":
            groups = [[i for i in range(37) if samples[i] == s] for s in range(4)]
        want = [0.0] * 37
        for rows in groups:
            ordered = sorted(excess[i] for i in rows)
            place = (1 - fraction) * (len(rows) - 1)
            low = int(place)
            high = min(low + 1, len(rows) - 1)
            quantile = ordered[low] + (place - low) * (ordered[high] - ordered[low])
            if scope == "running":
                threshold = quantile if threshold is None else 0.8 * threshold + 0.2 * quantile
                quantile = threshold
            kept = [i for i in rows if excess[i] >= quantile - 1e-7]
            for i in kept:
                want[i] = len(rows) / len(kept) if normalise == "kept" else 1.0
        torch.testing.assert_close(found, torch.tensor(want))


def test_all_that_is_worse_than_the_reference_is_kept_where_asked() -> None:
    losses, reference = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 5.0, 3.9])
    facts = RowFacts(reference_losses=reference)
    weights = by_name("delta-loss", keep="positive")
    torch.testing.assert_close(weights(losses, facts, 0), torch.tensor([0.0, 2.0, 0.0, 2.0]))
    assert by_name("delta-loss", keep="positive", normalise="all")(losses, facts, 0).tolist() == [0, 1, 0, 1]
    assert weights(reference, facts, 0).tolist() == [0.0] * 4


def test_the_least_are_the_other_end() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 0.5, 5.0])
    facts = RowFacts(reference_losses=torch.tensor([0.0, 0.0, 3.0, 0.5, 4.5]))
    found = by_name("delta-loss", keep="least", fraction=0.4, normalise="all")(losses, facts, 0)
    assert found.tolist() == [0, 0, 1, 1, 0], "the quantile of the code keeps two of five"
    best = by_name("delta-loss", fraction=0.4, normalise="all")(losses, facts, 0)
    assert best.tolist() == [1, 1, 0, 0, 0]


def test_the_kept_fraction_falls_in_a_straight_line() -> None:
    weights = DeltaLoss(fraction=0.4, anneal=0.5)
    facts = RowFacts(reference_losses=torch.zeros(101))
    counts = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        weights.progress = progress
        counts.append(int((weights(rand(101), facts, 0) > 0).sum()))
    assert counts == [kept_count(101, k) for k in (1.0, 0.7, 0.4, 0.4)] == [101, 71, 41, 41]


def test_kept_rows_count_as_often_as_they_are_reached_where_asked() -> None:
    losses, survival = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0]), torch.tensor([0.5, 0.9, 0.25, 1.0, 1.0])
    facts = RowFacts(reference_losses=torch.zeros(5), survival=survival)
    weights = DeltaLoss(fraction=0.5, normalise="all", survival=True)
    assert weights(losses, facts, 0).tolist() == [0.5, 0.0, 0.25, 0.0, 1.0]
    assert set(weights.needs) == {"reference_losses", "survival"}
    assert DeltaLoss().needs == ("reference_losses",)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 12), depth=st.integers(1, 5), seed=st.integers(0, 1000))
def test_chain_survival_is_the_mean_over_the_places_of_a_chain(length: int, depth: int, seed: int) -> None:
    acceptances, counted = rand(length, seed=seed), rand(length, seed=seed + 1) < 0.7
    found = chain_survival(acceptances, counted, depth)
    for t in range(length):
        total = 0.0
        for begun in range(depth):
            reached = 1.0
            for back in range(1, begun + 1):
                reached *= float(acceptances[t - back]) if t >= back and counted[t - back] else 0.0
            total += reached
        assert float(found[t]) == pytest.approx(total / depth, abs=1e-6)
