"""DistillSpec's objective: values against naive losses over the whole text, packed as alone; AdaSPEC's rows against
explicit loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.drafters.standalone import Standalone
from draftsmith.numerics.losses import by_name, forward_kl, total_variation
from draftsmith.selection.tokens import by_name as weights_by_name
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.objectives.base import StepLosses
from draftsmith.training.objectives.distillation import DistillationObjective
from tests.tiny import VOCAB, tiny_draft, tiny_target
from tests.unit.training.stored import random_samples, stored

CPU = torch.device("cpu")
WHOLE = VocabMap.identity(VOCAB)
PART = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return stored(random_samples(8, seed=3), tmp_path_factory.mktemp("distillation"))


def objective(draft: Standalone, loss: str = "forward-kl", **more: object) -> DistillationObjective:
    weight: Tensor = tiny_target().model.get_output_embeddings().weight
    return DistillationObjective(draft, weight[draft.vocab.target_ids], by_name(loss), block_rows=7, **more)


def term(made: DistillationObjective, rows: list[list[StoredSample]]) -> StepLosses:
    (found,) = made.losses(made.collate(rows, CPU), (0, 0))
    return found


def naive(draft: Standalone, sample: StoredSample, loss: str) -> dict[int, Tensor]:
    """A text's losses by position, from the two models' own logits over it, in float64."""
    ids = sample.ids[None]
    p = tiny_target().model(input_ids=ids).logits[0].double().log_softmax(-1)[:, draft.vocab.target_ids]
    q = draft.model(input_ids=ids).logits[0].double()[:, draft.vocab.target_ids].log_softmax(-1)
    values = by_name(loss)(p, q)
    return {t: values[t] for t in range(len(sample.ids) - 1) if sample.mask[t + 1]}


@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl", "jsd", "tv", "lk"])
@pytest.mark.parametrize("vocab", [WHOLE, PART], ids=["whole", "part"])
def test_losses_equal_naive_ones_however_packed(samples: FeatureStore, loss: str, vocab: VocabMap) -> None:
    draft = tiny_draft("llama", 4, vocab)
    texts = [s for s in samples if bool(s.answer_rows.any())]
    assert len(texts) > 4
    with torch.no_grad():
        alone = [naive(draft, s, loss) for s in texts]
    for rows in ([texts[:3], texts[3:]], [[s] for s in texts]):
        found = term(objective(draft, loss), rows)
        order = [s for row in rows for s in row]
        assert found.facts.samples is not None
        assert found.facts.places is not None
        got = {
            (order[int(s)].id, int(t)): float(v)
            for s, t, v in zip(found.facts.samples, found.facts.places, found.values.detach(), strict=True)
        }
        want = {(s.id, t): float(v) for s, values in zip(texts, alone, strict=True) for t, v in values.items()}
        assert got.keys() == want.keys()
        assert all(got[key] == pytest.approx(want[key], abs=2e-5) for key in want)


def test_gradients_equal_naive_ones(samples: FeatureStore) -> None:
    draft = tiny_draft("llama", 3, PART)
    texts = [samples[i] for i in range(4)]
    term(objective(draft), [texts[:2], texts[2:]]).values.sum().backward()
    found = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    torch.stack([v for s in texts for v in naive(draft, s, "forward-kl").values()]).sum().backward()
    assert len(found) == len(list(draft.parameters()))
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=2e-3)


def test_counts_and_positions_are_known_before_anything_is_computed(samples: FeatureStore) -> None:
    made = objective(tiny_draft("llama", 2))
    texts = list(samples)
    batch = made.collate([texts[:5], texts[5:]], CPU)
    assert batch.positions == sum(len(s.ids) for s in texts)
    (found,) = made.losses(batch, (0, 0))
    assert batch.counts == [len(found.values)] == [sum(int(s.answer_rows.sum()) for s in texts)]


def test_what_follows_an_answers_end_teaches_nothing(samples: FeatureStore) -> None:
    sample = samples[0]
    last = torch.zeros_like(sample.mask)
    last[-1] = True
    made = objective(tiny_draft("llama", 2))
    assert not made.teaches(
        StoredSample("a", sample.ids, ~torch.ones_like(last), True, sample.hidden, sample.statistics)
    )
    only = StoredSample("b", sample.ids, last, True, sample.hidden, sample.statistics)
    assert made.teaches(only)
    found = term(made, [[only]])
    assert found.facts.places is not None
    assert found.facts.places.tolist() == [len(sample.ids) - 2]


def test_k_of_one_is_distillspec_bit_for_bit(samples: FeatureStore) -> None:
    draft = tiny_draft("llama", 3)
    gradients = []
    for name, options in (
        ("uniform", {}),
        ("delta-loss", {"fraction": 1.0}),
        ("delta-loss", {"fraction": 1.0, "scope": "sample"}),
        ("delta-loss", {"fraction": 1.0, "scope": "running", "normalise": "all"}),
    ):
        weights = weights_by_name(name, **options)  # type: ignore[arg-type]
        draft.zero_grad()
        for part in ([samples[0], samples[1]], [samples[2], samples[3]]):
            found = term(objective(draft), [part])
            reference = torch.randn(len(found.values), generator=torch.Generator().manual_seed(1))
            facts = found.facts.__class__(samples=found.facts.samples, reference_losses=reference)
            (weights(found.values, facts, 0) * found.values).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in draft.parameters() if p.grad is not None]))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_rows_may_be_judged_by_another_divergence_than_is_trained(samples: FeatureStore) -> None:
    draft = tiny_draft("llama", 3)
    rows = [[samples[0], samples[1]]]
    trained = term(objective(draft, "tv", judge=forward_kl), rows)
    judged = term(objective(draft), rows).values
    torch.testing.assert_close(trained.values, term(objective(draft, "tv"), rows).values)
    assert trained.facts.judged is not None
    assert not trained.facts.judged.requires_grad
    torch.testing.assert_close(trained.facts.judged, judged.detach())
    reference = torch.zeros_like(judged.detach())
    facts = trained.facts.__class__(reference_losses=reference, judged=trained.facts.judged)
    kept = weights_by_name("delta-loss", fraction=0.3)(trained.values, facts, 0) > 0
    count = int(kept.sum())
    assert set(judged.argsort(descending=True)[:count].tolist()) == set(kept.nonzero().squeeze(-1).tolist())


def test_survival_follows_the_drafts_own_acceptance(samples: FeatureStore) -> None:
    """Against a walk over every chain of three tokens that could have reached a row."""
    draft = tiny_draft("llama", 6)
    texts = [s for s in samples if int(s.answer_rows.sum()) > 3]
    found = term(objective(draft, chain=3), [texts])
    assert found.facts.samples is not None
    assert found.facts.places is not None
    assert found.facts.survival is not None
    accepted = [{t: 1.0 - float(v.detach()) for t, v in naive(draft, s, "tv").items()} for s in texts]
    assert max(max(a.values()) for a in accepted) > 0.5
    for s, t, value in zip(found.facts.samples, found.facts.places, found.facts.survival, strict=True):
        alpha = accepted[int(s)]
        total = 0.0
        for begun in range(3):
            reached = 1.0
            for back in range(1, begun + 1):
                reached *= alpha.get(int(t) - back, 0.0)
            total += reached
        assert float(value) == pytest.approx(total / 3, abs=1e-4)
    assert term(objective(draft), [texts]).facts.survival is None


def test_stored_losses_of_a_reference_come_back_at_their_rows(samples: FeatureStore) -> None:
    made = objective(tiny_draft("llama", 2))
    texts = []
    for sample in samples:
        extra = {"reference_loss.0": torch.arange(len(sample.ids)).float() + 100 * float(len(texts))}
        merged = {**sample.statistics, **extra}
        texts.append(StoredSample(sample.id, sample.ids, sample.mask, True, sample.hidden, merged))
    found = term(made, [texts[:4], texts[4:]])
    facts = found.facts
    assert facts.samples is not None
    assert facts.places is not None
    assert facts.reference_losses is not None
    assert torch.equal(facts.reference_losses, facts.places + 100.0 * facts.samples)
    assert term(made, [[texts[0], samples[1]]]).facts.reference_losses is None


def test_a_divergence_of_one_is_no_overlap(samples: FeatureStore) -> None:
    """Mass outside the draft vocabulary is lost overlap: a draft of three tokens can't come near."""
    never = VocabMap(torch.tensor([0, 1, 2]), VOCAB)
    found = term(objective(tiny_draft("llama", 3, never), "tv"), [[samples[0], samples[1]]])
    assert float(found.values.detach().min()) > 0.3
    assert float(found.values.detach().max()) <= 1.0 + 1e-6
    assert total_variation is by_name("tv").func  # type: ignore[attr-defined]


def test_nothing_is_read_but_the_final_state(tmp_path: Path) -> None:
    reads = objective(tiny_draft("llama", 2)).reads
    assert reads.final
    assert not reads.layers
