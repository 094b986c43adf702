"""Chains of any length from one pass of the draft: the counts of replays that draft each chain anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from draftsmith.data.features import FeatureStore
from draftsmith.data.samples import Sample
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.standalone import Standalone
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay, stored_answer
from draftsmith.numerics.losses import forward_kl
from draftsmith.studies.chains import Chains, chain_rows, followed, walked
from draftsmith.studies.corpus import AnswerSet
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.objectives.distillation import DistillationObjective
from tests.tiny import END, VOCAB, tiny_draft, tiny_target
from tests.unit.training.stored import answered, stored

LENGTHS = (1, 2, 4, 7)
PART = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 5 != 1], VOCAB)
COMMON = {
    "study": "adaspec",
    "method": "distillspec",
    "accounting": "equal-epochs",
    "keep": 1.0,
    "seed": 0,
    "training_seconds": 1.0,
    "training_steps": 1,
    "training_positions": 1,
    "training_cost": 1,
}


def texts() -> list[Sample]:
    """The target's answers, cut ones and ones that end."""
    found = []
    for number, sample in enumerate(answered(8, 24)):
        ids, mask = sample.ids, sample.mask
        if number % 2 and ids[-1] != END:
            ids, mask = [*ids, END], [*mask, True]
        found.append(Sample(sample.id, ids, mask, ids[-1] == END))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return stored(texts(), tmp_path_factory.mktemp("chains"))


def objective(draft: Standalone) -> DistillationObjective:
    weight = tiny_target().model.get_output_embeddings().weight
    return DistillationObjective(draft, weight[draft.vocab.target_ids], forward_kl)


def answer_set(store: FeatureStore, ids: Sequence[str]) -> AnswerSet:
    return AnswerSet("sums", "tests", 0.0, ids, [stored_answer(store[i]) for i in ids])


@pytest.mark.parametrize(("keep", "vocab"), [(6, None), (6, PART), (8, None)], ids=["some", "part", "all-right"])
def test_chains_have_the_rounds_of_a_replay(store: FeatureStore, keep: int, vocab: VocabMap | None) -> None:
    draft, target = tiny_draft("llama", keep, vocab).eval(), tiny_target()
    tests = answer_set(store, list(store.ids))
    rows = chain_rows(objective(draft), {0.0: store}, [tests], LENGTHS, target.spec.eos_ids, COMMON, {"a": 1})
    deepest = 0
    for length, row in zip(LENGTHS, rows, strict=True):
        replayed = replay(Single(draft, ChainGrowth(length)), target.spec, tests.answers)
        each = [metrics.count([g]) for g in replayed]
        counts = metrics.count(replayed)
        assert row.rounds == tuple(c.rounds for c in each)
        assert row.committed == tuple(c.committed for c in each)
        assert row.rejected == tuple(sum(c.offered_at_depth) - sum(c.accepted_at_depth) for c in each)
        assert row.alpha == pytest.approx(metrics.adaspec(counts))
        assert row.alpha_by_depth == pytest.approx(counts.acceptance_by_depth)
        assert row.acceptance_length == pytest.approx(counts.acceptance_length)
        assert (row.growth, row.node_budget, row.extra["a"]) == ("chain", length, 1)
        deepest = max(deepest, len(row.alpha_by_depth))
        assert sum(row.rejected) > 0 or keep == 8
    assert deepest >= 4, "no chain was accepted to any depth"
    assert any(a.complete for a in tests.answers)
    assert not all(a.complete for a in tests.answers)


def test_the_last_token_is_drafted_only_where_it_is_an_end() -> None:
    assert walked([True] * 3, 4, complete=True) == Chains(1, [1, 1, 1, 0], [1, 1, 1, 0])
    assert walked([True] * 3, 4, complete=False) == Chains(1, [1, 1, 0, 0], [1, 1, 0, 0])
    assert walked([True, False, True, True], 2, complete=True) == Chains(2, [2, 1], [2, 2])
    assert walked([], 3, complete=True) == Chains(0, [0, 0, 0], [0, 0, 0])


def test_overlap_is_the_common_mass_on_the_answers_own_tokens(store: FeatureStore) -> None:
    draft, target = tiny_draft("llama", 6, PART).eval(), tiny_target()
    name = store.ids[0]
    sample = store[name]
    with torch.no_grad():
        p = target.model(input_ids=sample.ids[None]).logits[0].double().softmax(-1)[:, PART.target_ids]
        q = draft.model(input_ids=sample.ids[None]).logits[0].double()[:, PART.target_ids].softmax(-1)
    rows = [t for t in range(len(sample.ids) - 1) if sample.mask[t + 1]][1:]
    read = followed(objective(draft), store, [name])[name]
    expected = [float(torch.minimum(p[t], q[t]).sum()) for t in rows]
    assert read.overlap == pytest.approx(expected, abs=1e-4)
    assert read.right == [int(PART.target_ids[q[t].argmax()]) == int(sample.ids[t + 1]) for t in rows]
