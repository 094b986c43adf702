"""Token scores: one sign, and the formulas that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import overlap, statistics
from draftsmith.selection.scores import DRAFT_AWARE, SCORES, Evidence, available, token_scores


def evidence_of(logits: Tensor, **overlaps: Tensor) -> Evidence:
    tokens = torch.zeros(logits.shape[0], dtype=torch.int64)
    return Evidence(statistics(logits, lambda rows: rows, tokens), **overlaps)


@pytest.mark.parametrize("name", ["flatness", "entropy", "top-1", "margin", "energy", "nll"])
def test_a_flatter_distribution_scores_higher(name: str) -> None:
    peaked, middling, flat = torch.tensor([9.0, 0, 0, 0]), torch.tensor([3.0, 0, 0, 0]), torch.tensor([0.5, 0, 0, 0])
    scores = token_scores(name, evidence_of(torch.stack([peaked, flat, middling])))
    assert scores.dtype == torch.float32
    assert scores.argsort().tolist() == [0, 2, 1]


def test_draft_aware_scores_are_overlaps_of_the_very_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    target, drafter, reference = (torch.randn(6, 40, generator=generator) * 2 for _ in range(3))
    p, q, r = (z.double().softmax(-1) for z in (target, drafter, reference))
    evidence = evidence_of(
        target,
        overlaps=overlap(target.log_softmax(-1), drafter.log_softmax(-1)),
        reference_overlaps=overlap(target.log_softmax(-1), reference.log_softmax(-1)),
    )
    accepted, possible = torch.minimum(p, q).sum(-1), torch.minimum(p, r).sum(-1)
    flat = torch.cosine_similarity(p, torch.ones_like(p), dim=-1)
    want = {
        "disagreement": 1 - accepted,
        "gap": possible - accepted,
        "flatness-x-disagreement": flat * (1 - accepted),
        "flatness-x-gap": flat * (possible - accepted),
    }
    assert set(want) == DRAFT_AWARE
    for name, values in want.items():
        torch.testing.assert_close(token_scores(name, evidence), values.float(), rtol=1e-5, atol=1e-6)


def test_what_is_available_depends_on_what_is_known() -> None:
    logits = torch.randn(3, 9)
    alone = available(evidence_of(logits))
    assert set(alone) == set(SCORES) - DRAFT_AWARE
    drafted = available(evidence_of(logits, overlaps=torch.rand(3)))
    assert set(drafted) - set(alone) == {"disagreement", "flatness-x-disagreement"}
    both = evidence_of(logits, overlaps=torch.rand(3), reference_overlaps=torch.rand(3))
    assert set(available(both)) == set(SCORES)
    assert set(available(both, ["gap", "nll"])) == {"gap", "nll"}


def test_wrong_names_and_missing_overlaps_are_refused() -> None:
    evidence = evidence_of(torch.randn(3, 9))
    with pytest.raises(UserError, match="no token score is called 'flatnes'; did you mean 'flatness'"):
        token_scores("flatnes", evidence)
    with pytest.raises(UserError, match="needs a drafter to compare the target with"):
        token_scores("disagreement", evidence)
    with pytest.raises(UserError, match="needs a reference drafter"):
        token_scores("gap", evidence_of(torch.randn(3, 9), overlaps=torch.rand(3)))
