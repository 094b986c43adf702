"""Sample selection against independent short statements, and its reasons, limits and order."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.selection.cleaning import Guard
from draftsmith.selection.samples import METHODS, ScoredSample, Selection, SelectionOptions, best_first, joined, select
from draftsmith.selection.scores import SCORES


def sample(name: str, values: Sequence[float], prompt: int = 10, **more: Any) -> ScoredSample:
    scores = {"flatness": torch.tensor(values, dtype=torch.float32)}
    return ScoredSample(name, len(values), prompt + len(values), scores, **more)


def corpus(seed: int, count: int, empty: float = 0.0) -> list[ScoredSample]:
    rng = random.Random(seed)
    lengths = [0 if rng.random() < empty else rng.randint(1, 30) for _ in range(count)]
    return [sample(f"s{i:03}", [rng.random() for _ in range(n)], rng.randint(1, 50)) for i, n in enumerate(lengths)]


def paper_code(answers: list[list[float]], quantile: float) -> list[int]:
    """SFDD's code, its bug left out: score batches of four in a row by 1 − cos, weighted by tokens, keep the least."""
    batches = [answers[start : start + 4] for start in range(0, len(answers), 4)]
    distances = []
    for batch in batches:
        total, valid = 0.0, 0
        for answer in batch:
            total, valid = total + sum(1.0 - cosine for cosine in answer), valid + len(answer)
        distances.append(total / valid if valid else float("inf"))  # the code says 0.0, the flattest: always kept
    k = max(1, round(quantile * len(batches)))
    kept = [b for b in np.argsort(distances, kind="stable")[:k] if distances[b] < float("inf")]
    return sorted(i for b in kept for i in range(b * 4, min(b * 4 + 4, len(answers))))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31), count=st.integers(1, 60), ratio=st.floats(0.01, 1.0), empty=st.sampled_from([0.0, 0.6])
)
def test_batches_are_chosen_as_the_paper_s_code_does(seed: int, count: int, ratio: float, empty: float) -> None:
    samples = corpus(seed, count, empty)
    if not any(one.tokens for one in samples):
        return
    got = select(samples, SelectionOptions(unit="batch", ratio=ratio))
    want = paper_code([one.scores["flatness"].double().tolist() for one in samples], ratio)
    assert got.kept == tuple(samples[i].id for i in want)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), ratio=st.floats(0.01, 1.0), mean=st.booleans())
def test_samples_are_chosen_by_the_mean_or_median_of_their_answer(
    seed: int, count: int, ratio: float, mean: bool
) -> None:
    samples = corpus(seed, count)
    got = select(samples, SelectionOptions(ratio=ratio, aggregate="mean" if mean else "median"))
    value = {one.id: (np.mean if mean else np.median)(one.scores["flatness"].double().numpy()) for one in samples}
    best = sorted(value, key=lambda name: -value[name])[: max(1, round(ratio * count))]
    assert set(got.kept) == set(best)
    assert got.thresholds == pytest.approx((min(value[name] for name in best),))
    assert got.scores == pytest.approx(value)


def test_best_first_keeps_groups_mixed() -> None:
    samples = [sample(f"flat{i}", [0.9 - 0.01 * i]) for i in range(6)]
    samples += [sample(f"peaked{i}", [0.1 + 0.01 * i]) for i in range(3)]
    chosen = select(samples, SelectionOptions(ratio=1.0))
    group_of = {one.id: one.id.rstrip("0123456789") for one in samples}
    order = best_first(chosen, group_of)
    assert sorted(order) == sorted(chosen.kept)
    assert [name for name in order if name.startswith("flat")] == [f"flat{i}" for i in range(6)]
    assert [name for name in order if name.startswith("peaked")] == ["peaked2", "peaked1", "peaked0"]
    # any first part holds a third of peaked ones, but for rounding
    for size in range(1, 10):
        assert abs(sum(name.startswith("peaked") for name in order[:size]) - size / 3) <= 1
    together = best_first(chosen, dict.fromkeys(group_of, ""))
    assert together[:6] == [f"flat{i}" for i in range(6)]
    with pytest.raises(UserError, match="need ranked samples"):
        best_first(select(samples, SelectionOptions(method="full")), group_of)


def test_equal_scores_are_settled_by_id_and_the_kept_stay_in_order() -> None:
    samples = [sample(name, [0.5]) for name in "dbca"] + [sample("z", [0.9])]
    assert select(samples, SelectionOptions(number=3)).kept == ("b", "a", "z")
    assert select(samples[::-1], SelectionOptions(number=3)).kept == ("z", "a", "b")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"full"}))
def test_every_score_can_choose(method: str) -> None:
    samples = [ScoredSample(f"s{i}", 1, 5, {name: torch.tensor([float(i)]) for name in SCORES}) for i in range(6)]
    kept = select(samples, SelectionOptions(method=method, ratio=1 / 3)).kept
    assert len(kept) == 2
    if method != "random":
        assert kept == ("s4", "s5")


def test_full_keeps_everything_that_teaches() -> None:
    samples = [ScoredSample("a", 3, 9, {}), ScoredSample("none", 0, 4, {}), ScoredSample("b", 1, 2, {})]
    got = select(samples, SelectionOptions(method="full"))
    assert got.kept == ("a", "b")
    assert got.dropped == {"none": "no answer tokens"}
    assert (got.tokens_kept, got.tokens_total, got.positions_kept, got.positions_total) == (4, 4, 11, 15)
    assert got.thresholds == ()


def test_random_is_keyed_by_seed_and_id_and_grows() -> None:
    samples = corpus(0, 200)

    def chosen(**options: Any) -> set[str]:
        return set(select(samples, SelectionOptions(method="random", **options)).kept)

    half = chosen(ratio=0.5)
    assert len(half) == 100
    assert half == set(select(samples[::-1], SelectionOptions(method="random", ratio=0.5)).kept)
    assert chosen(ratio=0.3) < half < chosen(ratio=0.7)
    assert 30 < len(half & chosen(ratio=0.5, seed=1)) < 70
    # it is no score in disguise: neither length nor flatness decides
    for quantity in ([one.tokens for one in samples], [float(one.scores["flatness"].mean()) for one in samples]):
        ordered = sorted(range(200), key=lambda i: quantity[i])
        assert 30 < len(half & {samples[i].id for i in ordered[:100]}) < 70


def test_budgets_take_the_best_until_the_next_does_not_fit() -> None:
    samples = [
        sample("a", [0.9] * 30, prompt=70),
        sample("b", [0.8] * 50, prompt=0),
        sample("c", [0.7] * 10, prompt=90),
        sample("d", [0.6] * 1, prompt=0),
    ]
    assert select(samples, SelectionOptions(number=2)).kept == ("a", "b")
    assert select(samples, SelectionOptions(number=99)).kept == ("a", "b", "c", "d")
    assert select(samples, SelectionOptions(tokens=90)).kept == ("a", "b", "c")
    assert select(samples, SelectionOptions(tokens=89)).kept == ("a", "b")  # d would fit, but it is worth less than c
    timed = SelectionOptions(seconds=15, positions_per_second=10)
    assert select(samples, timed).kept == ("a", "b")  # 100 + 50 positions
    assert select(samples, timed.model_copy(update={"epochs": 2, "seconds": 29.9})).kept == ("a",)
    with pytest.raises(UserError, match="limit of 29 is too small to keep even one sample"):
        select(samples, SelectionOptions(tokens=29))
    got = select(samples, SelectionOptions(tokens=90))
    assert (got.tokens_kept, got.tokens_total, got.positions_kept, got.positions_total) == (90, 91, 250, 251)


def test_batches_count_their_samples_and_tokens() -> None:
    samples = [sample(f"s{i}", [i / 10] * (i + 1)) for i in range(6)]
    assert select(samples, SelectionOptions(unit="batch", batch_size=2, number=3)).kept == ("s4", "s5")
    assert select(samples, SelectionOptions(unit="batch", batch_size=2, tokens=11)).kept == ("s4", "s5")
    assert select(samples, SelectionOptions(unit="batch", batch_size=2, tokens=18)).kept == ("s2", "s3", "s4", "s5")


def test_strata_keep_the_distribution_of_lengths() -> None:
    # the score is the length: without strata only long samples are kept
    samples = [sample(f"s{i:03}", [i / 100] * (i + 1), prompt=0) for i in range(100)]
    assert select(samples, SelectionOptions(ratio=0.3)).kept == tuple(f"s{i:03}" for i in range(70, 100))
    got = select(samples, SelectionOptions(ratio=0.3, strata=10))
    assert got.kept == tuple(f"s{i:03}" for i in range(100) if i % 10 >= 7)
    assert got.thresholds == pytest.approx([(10 * group + 7) / 100 for group in range(10)])
    by_tokens = select(samples, SelectionOptions(tokens=1000, strata=4))
    assert 900 < by_tokens.tokens_kept <= 1000
    for group in range(4):
        mine = samples[25 * group : 25 * group + 25]
        kept = sum(one.tokens for one in mine if one.id in by_tokens.kept)
        assert abs(kept - 1000 / 5050 * sum(one.tokens for one in mine)) < max(one.tokens for one in mine)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), strata=st.integers(1, 12), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 999))
def test_strata_do_not_change_how_many_are_kept(count: int, strata: int, ratio: float, seed: int) -> None:
    samples = corpus(seed, count)
    got = select(samples, SelectionOptions(ratio=ratio, strata=strata))
    assert len(got.kept) == max(1, round(ratio * count))
    assert len(got.thresholds) == strata


def test_duplicates_and_garbage_go_first_with_their_reason() -> None:
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    other = "A robe takes two bolts of blue fibre and half that much white fibre, so three bolts in total."
    samples = [
        sample("copy", [0.99], text=text.upper()),
        sample("cut", [0.98], text=other, complete=False),
        sample("loop", [0.97], text="again and again " * 30),
        sample("a", [0.5], text=text),
        sample("b", [0.4], text=other + " Well, that is what they say, but nobody knows."),
        sample("empty", []),
    ]
    plain = select(samples, SelectionOptions(number=3))
    assert plain.kept == ("copy", "cut", "loop")
    assert plain.dropped == {"a": "not chosen", "b": "not chosen", "empty": "no answer tokens"}
    options = SelectionOptions(ratio=0.5, near_duplicates=0.8, guard=Guard())
    got = select(samples, options)
    assert got.kept == ("a",)
    assert got.dropped == {
        "copy": "near-duplicate of a",
        "cut": "cut answer",
        "loop": "repeated n-grams (97%)",
        "b": "not chosen",
        "empty": "no answer tokens",
    }
    assert set(got.scores) == {"a", "b"}
    assert got.tokens_total == 5


def test_garbage_does_not_stand_for_its_sound_copy() -> None:
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    samples = [sample("a", [0.5], text=text, complete=False), sample("b", [0.4], text=text)]
    got = select(samples, SelectionOptions(near_duplicates=0.8, guard=Guard()))
    assert got.kept == ("b",)
    assert got.dropped == {"a": "cut answer"}


def test_rows_are_json_and_lead_back() -> None:
    samples = corpus(3, 20, empty=0.2)
    for options in (SelectionOptions(strata=3), SelectionOptions(method="full"), SelectionOptions(unit="batch")):
        selection = select(samples, options)
        rows = json.loads(json.dumps(selection.to_rows(), allow_nan=False))
        assert Selection.from_rows(rows) == selection
        assert {row["id"] for row in rows[1:]} == {one.id for one in samples}
    with pytest.raises(UserError, match="these rows are no selection"):
        Selection.from_rows([{"id": "a"}])
    with pytest.raises(UserError, match="these rows are no selection"):
        Selection.from_rows([])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample("a", [0.1]), sample("a", [0.2])], "'a' occurs twice"),
        ([ScoredSample("a", 1, 2, {"entropy": torch.ones(1)})], "'a' has no scores 'flatness'; there are entropy"),
        ([ScoredSample("a", 2, 3, {"flatness": torch.ones(1)})], "'a' has 2 answer tokens and 1 scores"),
        ([sample("a", [float("nan")])], "'flatness' of the sample 'a' is not a number"),
        ([sample("a", [])], "nothing to choose from: of 1 samples none"),
        ([], "nothing to choose from"),
    ],
)
def test_what_cannot_be_ranked_is_refused(samples: list[ScoredSample], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(samples, SelectionOptions())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "flatnes"}, "did you mean 'flatness'"),
        ({"ratio": 0.5, "tokens": 3}, "only one of ratio, number, tokens and seconds"),
        ({"method": "full", "ratio": 0.5}, "method full keeps every sample"),
        ({"seconds": 3.0}, "seconds needs positions_per_second"),
        ({"guard": {"max_script": 3}}, "max_script"),
    ],
)
def test_contradicting_options_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(SelectionOptions, data, "the command line")


def test_selections_within_sets_become_one() -> None:
    one, other = corpus(1, 12), [ScoredSample("t" + s.id, s.tokens, s.positions, s.scores) for s in corpus(2, 9)]
    parts = [select(group, SelectionOptions(method="flatness", ratio=0.5)) for group in (one, other)]
    order = [s.id for s in other + one][::-1]
    whole = joined(parts, order)
    assert set(whole.kept) == {*parts[0].kept, *parts[1].kept}
    assert list(whole.kept) == sorted(whole.kept, key=order.index)
    assert joined(parts).kept == parts[0].kept + parts[1].kept
    assert whole.tokens_kept == sum(s.tokens for s in one + other if s.id in {*parts[0].kept, *parts[1].kept})
    assert whole.positions_total == sum(s.positions for s in one + other)
    assert whole.thresholds == parts[0].thresholds + parts[1].thresholds
    assert set(whole.dropped) | {*parts[0].kept, *parts[1].kept} == {s.id for s in one + other}
