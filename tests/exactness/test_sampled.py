"""Rules for sampled candidates keep the target's law: every outcome enumerated in float64, keyed draws counted."""

from __future__ import annotations

import pytest
import torch

from draftsmith.decoding.composition import Single
from draftsmith.decoding.drawn import SampledGrowth
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, Growth, GrowthOptions, Limits
from draftsmith.decoding.verification import Verification
from draftsmith.drafters.base import Proposal
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.target.protocol import Target
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.checks import speculative_equals_plain
from tests.exactness.sampled import CASES, WIDE, frequencies_are_the_targets, law_is_the_targets
from tests.exactness.table import TableDrafter, TableTarget

SAMPLINGS = {
    "bare": Sampling(temperature=1.0),
    "temperature-penalty": Sampling(temperature=0.7, repetition_penalty=1.6),
    "top-k-no-repeat": Sampling(temperature=1.3, top_k=2, no_repeat_ngram_size=3),
    "top-p-suppress": Sampling(temperature=1.1, top_p=0.8, suppress_tokens=(1,)),
}


@pytest.mark.parametrize("ends", [(), (0,)], ids=["no-end", "end"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("case", CASES)
def test_the_law_of_committed_tokens_is_the_targets(
    case: str, sampling: str, count: int, ends: tuple[int, ...]
) -> None:
    accepted = law_is_the_targets(CASES[case], SAMPLINGS[sampling], ends, count)
    if sampling == "bare":
        assert accepted == set(range(min(CASES[case].growth.depth, count - 1) + 1))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("case", WIDE)
def test_the_law_of_several_candidates_among_many_tokens(case: str, sampling: str) -> None:
    law_is_the_targets(WIDE[case], SAMPLINGS[sampling], (), 2)


@pytest.mark.parametrize("case", CASES)
def test_keyed_draws_have_the_targets_law(case: str) -> None:
    frequencies_are_the_targets(CASES[case], SAMPLINGS["bare"], count=3, draws=3000)


@pytest.mark.parametrize("rule", ["keyed", "token", "block"])
@pytest.mark.parametrize("batch", [1, 4])
def test_at_temperature_0_every_rule_writes_the_plain_text(rule: Verification, batch: int) -> None:
    accepted: set[int] = set()
    for seed in range(4):
        found = speculative_equals_plain("llama", SampledGrowth((1, 1, 1)), Sampling(seed=seed), batch, rule=rule)
        accepted |= {r.accepted for g in found for r in g.rounds}
    assert accepted == {0, 1, 2, 3}


@pytest.mark.parametrize("growth", [SampledGrowth((1, 1, 1)), SampledGrowth((3, 2), True), SampledGrowth((3, 2, 1))])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_keyed_rule_writes_the_plain_text_of_sampled_trees_too(
    growth: SampledGrowth, batch: int, temperature: float
) -> None:
    """Candidates come from another stream than the target's draw: which tree is verified can't change the text."""
    found = [
        g
        for seed in range(3)
        for g in speculative_equals_plain("llama", growth, Sampling(temperature=temperature, seed=seed), batch, 0.9)
    ]
    assert any(r.accepted for g in found for r in g.rounds)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_equals_each_alone(case: str) -> None:
    asked = [[1, 0, 1], [0, 1], [1], [0, 0, 1, 1]]
    sampling = Sampling(temperature=0.9, seed=5)
    new = [40, 5, 40, 11]
    together = CASES[case].engine().generate(asked, sampling, new)
    for i, prompt in enumerate(asked):
        alone = CASES[case].engine().generate([prompt], sampling, new[i], requests=[i])[0]
        assert alone.token_ids == together[i].token_ids
        assert [r.accepted for r in alone.rounds] == [r.accepted for r in together[i].rounds]
    assert len({r.accepted for g in together for r in g.rounds}) == CASES[case].growth.depth + 1
    assert all(r.kept == r.committed for g in together for r in g.rounds)


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    drafter = TableDrafter(VocabMap.identity(4))

    def decode(growth: Growth, rule: Verification, target: Target) -> None:
        Engine(target, Single(drafter, growth), rule).generate([[1, 0]], Sampling(temperature=1.0), 8)

    with pytest.raises(UserError, match=r"verification 'token'.*growth\.kind"):
        decode(ChainGrowth(3), "token", TableTarget(4))
    with pytest.raises(UserError, match=r"'block' is for chains.*growth\.branches"):
        decode(SampledGrowth((2, 1)), "block", TableTarget(4))
    stored = StoredAnswer([1, 0, 2, 2, 2, 2, 2, 2, 2, 2], 2, {}, False)
    for rule, growth in (("keyed", SampledGrowth((1, 1))), ("token", ChainGrowth(2))):
        with pytest.raises(UserError, match=r"stored answer.*sampled candidates"):
            decode(growth, rule, ReplayTarget(TableTarget(4).spec, [stored]))
    with pytest.raises(ValueError, match="draws"):
        SampledGrowth((1,)).grow(
            drafter, None, Proposal(torch.zeros(1, 1, 4)), Limits(torch.tensor([1]), torch.tensor([0]))
        )


def test_options_build_it() -> None:
    asked = {"kind": "sampled", "branches": [3, 1], "replacement": True}
    options = validate(GrowthOptions, asked, "here")
    assert options.build() == SampledGrowth((3, 1), True)
    assert options.model_dump(mode="json").items() >= asked.items()
    for wrong in ({"branches": []}, {"branches": [2, 0]}):
        with pytest.raises(UserError, match="branches"):
            validate(GrowthOptions, {"kind": "sampled", **wrong}, "here")
    assert "branches" not in GrowthOptions().model_dump()
