"""A reference's losses: stored once, they are those that it would have at every step, and choose the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.data.features import FeatureStore
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.standalone import Standalone
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError
from draftsmith.numerics.losses import by_name, forward_kl
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import reference, trainer
from draftsmith.training.account import Before
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective, compared
from draftsmith.training.objectives.distillation import DistillationObjective
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.objectives.hass import HassLossOptions, HassObjective
from draftsmith.training.options import TrainOptions
from draftsmith.training.reference import WithReference, store_losses
from draftsmith.training.trainer import train
from tests.tiny import VOCAB, tiny_draft, tiny_eagle, tiny_head, tiny_target
from tests.unit.training.stored import answered, random_samples, stored

CPU = torch.device("cpu")
EXACT = TrainOptions(steps=4, batch_positions=64, row_length=64, evaluations=1, precision="float32")
SELECTED = {"name": "delta-loss", "fraction": 0.5, "scope": "sample"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    several = [replace(sample, id=f"turns-{sample.id}") for sample in random_samples(4, seed=2)]
    return stored([*answered(6, 12), *several], tmp_path_factory.mktemp("reference"))


def weight() -> Tensor:
    found: Tensor = tiny_target().model.get_output_embeddings().weight
    return found


def distilled(draft: Standalone, loss: str = "forward-kl", judge: Any = None) -> DistillationObjective:
    return DistillationObjective(draft, weight(), by_name(loss), judge=judge)


def head_objective(seed: int) -> Eagle3Objective:
    return Eagle3Objective(tiny_head(seed=seed), weight(), forward_kl, steps=3, step_decay=0.8)


def hass_objective() -> HassObjective:
    return HassObjective(tiny_eagle(vocab=VocabMap.identity(VOCAB)), HassLossOptions(noise=0.0, first_phase=5))


@pytest.mark.parametrize("made", [lambda: distilled(tiny_draft("llama", 4)), lambda: head_objective(3), hass_objective])
def test_stored_losses_are_the_references_own_at_every_step(store: FeatureStore, tmp_path: Path, made: Any) -> None:
    """However the samples are packed later; for heads at each unrolled step."""
    judge: Objective = made()
    names = list(store.ids)
    store_losses(judge, store, names, EXACT, tmp_path / "losses", {"of": "r"}, CPU)
    source = WithReference(store, tmp_path / "losses", {"of": "r"})
    samples = [s for s in source.fetch(names, 0) if judge.teaches(s)]
    seen = 0
    for rows in ([samples[:4], samples[4:]], [[s] for s in samples]):
        for term in judge.losses(judge.collate(rows, CPU), ("x", 9)):
            assert term.facts.reference_losses is not None
            torch.testing.assert_close(term.facts.reference_losses, compared(term).detach(), atol=1e-5, rtol=1e-4)
            seen += len(term.values)
    assert seen > 100
    cost = artefacts.read_json(tmp_path / "losses" / "cost.json")
    assert cost["reference"]["judged"]["tokens"] == sum(len(s.ids) for s in samples)
    with pytest.raises(StaleError, match="of"):
        WithReference(store, tmp_path / "losses", {"of": "another"})


def test_what_judges_is_stored_not_what_is_trained(store: FeatureStore, tmp_path: Path) -> None:
    draft = tiny_draft("llama", 4)
    names = list(store.ids)
    for name, made in (("a", distilled(draft)), ("b", distilled(draft, "tv", judge=forward_kl))):
        store_losses(made, store, names, EXACT, tmp_path / name, {}, CPU)
    for one, other in zip(
        WithReference(store, tmp_path / "a").fetch(names, 0),
        WithReference(store, tmp_path / "b").fetch(names, 0),
        strict=True,
    ):
        if "reference_loss.0" in one.statistics:
            torch.testing.assert_close(one.statistics["reference_loss.0"], other.statistics["reference_loss.0"])


def test_an_interrupted_pass_goes_on(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = distilled(tiny_draft("llama", 3))
    names = list(store.ids)
    store_losses(made, store, names, EXACT, tmp_path / "whole", {}, CPU)
    save, calls = artefacts.save_tensors, []

    def killed(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            store_losses(made, store, names, EXACT, tmp_path / "killed", {}, CPU)
    store_losses(made, store, names, EXACT, tmp_path / "killed", {}, CPU)
    assert artefacts.checksum(tmp_path / "killed") == artefacts.checksum(tmp_path / "whole")


def run(store: Any, draft: Standalone, folder: Path, o: TrainOptions, **more: Any) -> dict[str, Any]:
    dev = Dev(tiny_target().spec, [stored_answer(store.outline(i)) for i in list(store.ids)[:3]], ChainGrowth(2))
    return train(
        draft, distilled(draft), store, list(store.ids), dev, o, folder / "d", folder / "log.jsonl", {}, **more
    )


def test_stored_losses_train_the_same_weights_as_a_reference_at_every_step(store: FeatureStore, tmp_path: Path) -> None:
    o = EXACT.model_copy(update={"weights": EXACT.weights.model_validate(SELECTED)})
    judge = distilled(tiny_draft("llama", 5))
    store_losses(judge, store, list(store.ids), EXACT, tmp_path / "losses", {}, CPU)
    online, offline, plain = (tiny_draft("llama", 2) for _ in range(3))
    cost = run(store, online, tmp_path / "online", o, reference=judge)["cost"]
    assert cost["reference"]["judged"]["tokens"] == cost["draft"]["trained"]["tokens"] > 0
    before = Before({"reference": {"draft": {}}}, {"reference": 1.5})
    cost = run(WithReference(store, tmp_path / "losses"), offline, tmp_path / "offline", o, before=before)["cost"]
    assert "reference" not in cost
    assert cost["before"] == before.counts
    measured = artefacts.read_json(tmp_path / "offline" / "d" / artefacts.MEASURED)
    assert measured["before"] == {"reference": 1.5}
    assert 0 < measured["seconds"] < 60
    run(store, plain, tmp_path / "plain", EXACT)
    for one, two, three in zip(online.parameters(), offline.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(one, three, atol=1e-5)


def test_averaged_weights_are_the_reference_where_asked(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses compared are those of a drafter that holds the averaged weights, and the trained ones come back."""
    o = EXACT.model_copy(update={"reference": "ema", "ema": 0.7, "weights": EXACT.weights.model_validate(SELECTED)})
    draft = tiny_draft("llama", 2)
    terms = trainer._Training.terms
    checked = []

    def watched(training: trainer._Training, part: Any, number: int) -> Any:
        assert training.average is not None
        twin = tiny_draft("llama", 2)
        twin.with_weights(training.average)
        before = [p.detach().clone() for p in training.parameters.values()]
        (found,) = list(terms(training, part, number))
        (expected,) = distilled(twin).losses(part, ())
        torch.testing.assert_close(found.facts.reference_losses, expected.values.detach())
        checked.append(not torch.allclose(found.values.detach(), expected.values.detach()))
        assert all(torch.equal(a, b) for a, b in zip(before, training.parameters.values(), strict=True))
        return [found]

    monkeypatch.setattr(trainer._Training, "terms", watched)
    run(store, draft, tmp_path, o)
    assert checked == [False, True, True, True]


def test_the_kept_share_is_told_how_far_training_is(store: FeatureStore, tmp_path: Path) -> None:
    o = EXACT.model_copy(update={"weights": EXACT.weights.model_validate({**SELECTED, "anneal": 1.0})})
    seen: list[float] = []

    made = o.weights.build()
    call = type(made).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made), "__call__", lambda self, *args: (seen.append(self.current), call(self, *args))[1])
        run(store, tiny_draft("llama", 2), tmp_path, o, reference=distilled(tiny_draft("llama", 3)))
    assert sorted(set(seen), reverse=True) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    assert replace(made, progress=1.0).current == 0.5  # type: ignore[type-var]


def test_a_reference_is_trained_plainly_once_and_charged(store: FeatureStore, tmp_path: Path) -> None:
    """The same start, the same steps, the divergence that judges; a second call makes nothing again."""
    target = tiny_target()
    made: list[Standalone] = []

    def fresh() -> Standalone:
        made.append(tiny_draft("llama", 2))
        return made[-1]

    def load(folder: Path) -> Standalone:
        found = load_drafter(folder, target, torch.float32)
        assert isinstance(found, Standalone)
        return found

    def objective_of(draft: Standalone, o: TrainOptions) -> DistillationObjective:
        return distilled(draft, o.loss, None if o.judge is None else by_name(o.judge))

    o = EXACT.model_copy(
        update={
            "loss": "tv",
            "judge": "forward-kl",
            "reference": "trained",
            "weights": EXACT.weights.model_validate(SELECTED),
        }
    )
    dev = Dev(target.spec, [stored_answer(store.outline(i)) for i in list(store.ids)[:3]], ChainGrowth(2))
    names = list(store.ids)
    source, cost = reference.trained(fresh, load, objective_of, store, names, dev, o, tmp_path, {"of": "x"})
    plain = tiny_draft("llama", 2)
    run(store, plain, tmp_path / "plain", EXACT)
    for one, other in zip(load(tmp_path / "reference").parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    model, start = load(tmp_path / "reference").model, tiny_draft("llama", 2).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, start.get_input_embeddings().weight)
    (term,) = distilled(plain).losses(distilled(plain).collate([[s] for s in source.fetch(names, 0)], CPU), ())
    torch.testing.assert_close(term.facts.reference_losses, term.values.detach(), atol=1e-5, rtol=1e-4)
    again, twice = reference.trained(fresh, load, objective_of, store, names, dev, o, tmp_path, {"of": "x"})
    assert len(made) == 1
    assert twice == cost
    assert min(cost.seconds.values()) > 0
    assert again.fetch(names[:1], 0)[0].statistics.keys() == source.fetch(names[:1], 0)[0].statistics.keys()
    taught = sum(len(s.ids) for s in store if bool(s.answer_rows.any()))
    trained = cost.counts["reference"]["draft"]["trained"]  # type: ignore[index]
    assert trained["passes"] == 4
    assert cost.counts["reference losses"]["reference"]["judged"]["tokens"] == taught  # type: ignore[index]
    reference.trained(fresh, load, objective_of, store, names, dev, o, tmp_path, {"of": "y"})
    assert len(made) == 2
