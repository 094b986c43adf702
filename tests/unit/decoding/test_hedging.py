"""Hedging against its bounds, its losses against drafting itself, and what may not be known when a member is chosen."""

from __future__ import annotations

import math

import pytest
import torch

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.decoding.hedging import HedgeRule, Standing, hedge, hedged, normal_hedge, updated
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.sampling import Sampling
from tests.exactness.composition_checks import a_choice_knows_only_rounds_before_it, losses_are_of_the_proposals_before
from tests.tiny import END, OracleDrafter, prompts, tiny_target


@pytest.mark.parametrize("regrets", [[0.3, -1.0], [5.0, 4.0, -2.0, 0.1], [1e-6, 0.0], [80.0, 79.0, 3.0]])
def test_normal_hedges_weights_solve_its_equation(regrets: list[float]) -> None:
    """The scale c is found again from two weights, and gives a mean of e."""
    weights = normal_hedge(regrets)
    assert math.isclose(sum(weights), 1)
    positive = [max(r, 0.0) for r in regrets]
    best = max(positive)
    # found by looking at many
    cs = [best**2 / 2 / (1 + math.log(len(regrets))) * (1 + k / 2000) for k in range(6000)]
    c = min(cs, key=lambda c: abs(sum(math.exp(p**2 / (2 * c)) for p in positive) / len(positive) - math.e))
    raw = [p / c * math.exp(p**2 / (2 * c)) for p in positive]
    assert [w / sum(raw) for w in raw] == pytest.approx(weights, abs=2e-3)
    assert all(w == 0 for w, r in zip(weights, regrets, strict=True) if r <= 0)


def test_without_a_positive_regret_all_weigh_the_same() -> None:
    assert normal_hedge([0.0, -1.0, -2.0]) == [1 / 3] * 3


def stream(means: list[float], rounds: int, seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(rounds, len(means), generator=generator)
    return (draws < torch.tensor(means)).double().tolist()


def played(losses: list[list[float]], scheme: str, rate: float) -> tuple[float, list[float]]:
    """The mixture's total loss over a stream, and the last weights."""
    regrets = [0.0] * len(losses[0])
    total, weights = 0.0, regrets
    for row in losses:
        weights = normal_hedge(regrets) if scheme == "normal" else hedge(regrets, rate)
        total += sum(w * loss for w, loss in zip(weights, row, strict=True))
        regrets = updated(regrets, weights, row)
    return total, weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("means", [[0.5, 0.3], [0.2, 0.4, 0.4, 0.4, 0.41], [0.5, 0.5]])
def test_regret_stays_within_the_bounds(means: list[float], seed: int) -> None:
    rounds, n = 2000, len(means)
    losses = stream(means, rounds, seed)
    best = min(sum(row[i] for row in losses) for i in range(n))
    rate = math.sqrt(8 * math.log(n) / rounds)
    total, _ = played(losses, "hedge", rate)
    assert total - best <= math.sqrt(rounds * math.log(n) / 2), "Hedge with its best rate"
    total, weights = played(losses, "normal", 0.0)
    # the paper's theorem 1 without its lower terms: sqrt(3 T (1 + ln N))
    assert total - best <= math.sqrt(3 * rounds * (1 + math.log(n)))
    if means[0] != means[1]:
        assert max(range(n), key=lambda i: weights[i]) == means.index(min(means))
        assert max(weights) > 0.9


def test_a_stream_that_turns_is_followed() -> None:
    """Adversarial halves: each member is right in one; the mixture loses little more than the better of both."""
    losses = [[0.0, 1.0]] * 300 + [[1.0, 0.0]] * 300
    total, _ = played(losses, "normal", 0.0)
    assert total - 300 <= math.sqrt(3 * 600 * (1 + math.log(2)))


def test_the_better_oracle_is_found() -> None:
    """In decoding: most later rounds are the better member's, whichever stands first, and tokens per round are near
    what it reaches alone."""
    target = tiny_target("llama")
    asked = prompts(4, seed=60)
    sampling = Sampling(suppress_tokens=(END,))
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, 96), strict=True)]
    growth = DynamicGrowth(8, 3, 3)
    stored = [StoredAnswer(t, len(p), {}, False) for t, p in zip(texts, asked, strict=True)]

    def rounds(composition: object) -> list[int]:
        found = Engine(ReplayTarget(target.spec, stored), composition).generate(asked, None, 96)  # type: ignore[arg-type]
        return [len(g.rounds) for g in found]

    better = rounds(Single(OracleDrafter(texts, 0.9, seed=1), growth))
    worse = rounds(Single(OracleDrafter(texts, 0.1, seed=2), growth))
    for order in ((0.9, 0.1), (0.1, 0.9)):
        for feedback in ("first", "path"):
            members = [Single(OracleDrafter(texts, d, seed=1 if d == 0.9 else 2), growth, str(d)) for d in order]
            found = rounds(hedged(members, feedback=feedback))
            assert sum(found) - sum(better) < 0.25 * (sum(worse) - sum(better))


def test_path_feedback_is_what_the_member_would_have_had_accepted() -> None:
    losses_are_of_the_proposals_before("path")


def test_first_feedback_is_whether_the_first_token_was_among_the_likeliest() -> None:
    losses_are_of_the_proposals_before("first")


def test_a_choice_knows_nothing_of_its_own_round() -> None:
    a_choice_knows_only_rounds_before_it()


def test_regrets_are_carried_as_far_as_asked() -> None:
    rule = HedgeRule((1, 1), (1, 1), carry=0.5)
    first = rule.start(2, 2)
    first.own = [[1.0, -1.0], [0.5, 2.0]]
    assert rule.start(1, 2).brought == [0.75, 0.5]
    assert rule.start(1, 2).brought == [0.375, 0.25]
    rule.forget()
    assert rule.start(3, 2).brought == [0.0, 0.0]


def test_draws_follow_the_weights_and_depend_on_prompt_and_round_only() -> None:
    rule = HedgeRule((1, 1, 1), (1, 1, 1), seed=3)
    weights = [0.2, 0.5, 0.3]
    drawn = [rule._picked(weights, 77, turn) for turn in range(6000)]
    for member, weight in enumerate(weights):
        assert abs(drawn.count(member) / 6000 - weight) < 4 * math.sqrt(weight / 6000)
    assert drawn == [rule._picked(weights, 77, turn) for turn in range(6000)]
    assert drawn != [rule._picked(weights, 78, turn) for turn in range(6000)]
    best = HedgeRule((1, 1, 1), (1, 1, 1), pick="best")
    assert best._picked([0.4, 0.2, 0.4], 1, 1) == 0


def test_the_losses_are_charged_to_what_was_played() -> None:
    """The mixture's loss is that of the weights of the choice, not of weights that know the outcome."""
    rule = HedgeRule((1, 1), (1, 1), scheme="hedge", rate=1.0)
    memory = rule.start(1, 2)
    memory.rounds, memory.names, memory.played = 1, [0], [[0.5, 0.5]]
    rule.losses = lambda seats, committed: [[0.0], [1.0]]  # type: ignore[method-assign]
    rule.learn(memory, [], [0], [[5]])
    assert memory.own == [[0.5, -0.5]]
    assert isinstance(memory, Standing)
