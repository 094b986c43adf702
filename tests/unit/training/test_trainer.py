"""The training loop: its learning rate, what it refuses, and that a head learns what it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.features import FeatureStore
from draftsmith.data.samples import Sample
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay, stored_answer
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import override, validate
from draftsmith.numerics import losses
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import trainer
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.options import TrainOptions, learning_rate
from draftsmith.training.trainer import train
from tests.tiny import VOCAB, tiny_target
from tests.unit.training.stored import answered, stored

FAST = TrainOptions(
    steps=4, learning_rate=3e-3, row_length=64, batch_positions=256, unroll_steps=3, evaluations=2, precision="float32"
)


def head(vocab: VocabMap | None = None) -> Eagle3:
    """As `stages.fresh_head` makes one."""
    target = tiny_target()
    vocab = vocab or VocabMap.identity(VOCAB)
    torch.manual_seed(1)
    made = Eagle3(eagle3_options(target.model.config, target.spec, vocab.size), vocab, target.embedding)
    made.begin_from(target.model.get_output_embeddings().weight, target.model.base_model.norm)
    return made


def dev(source: FeatureStore, depth: int = 3) -> Dev:
    return Dev(tiny_target().spec, [stored_answer(sample) for sample in source], ChainGrowth(depth))


def objective(made: Eagle3, o: TrainOptions = FAST) -> Eagle3Objective:
    """As `stages.train` makes one."""
    weight = tiny_target().model.get_output_embeddings().weight[made.vocab.target_ids]
    survival = "survival" in o.weights.build().needs
    steps = (o.unroll_steps, o.step_decay, o.detach_steps, o.checkpoint_steps)
    return Eagle3Objective(made, weight, losses.by_name(o.loss), *steps, survival=survival)


def trained(source: FeatureStore, folder: Path, options: TrainOptions = FAST, **more: Any) -> Path:
    made = head()
    log = folder / "log.jsonl"
    place = folder / "drafter"
    train(made, objective(made, options), source, source.ids, dev(source), options, place, log, {}, **more)
    return place


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Eight answers of 12 tokens."""
    return stored(answered(8, 12), tmp_path_factory.mktemp("trainer"))


class Seen:
    """A store that notes which samples each step is given."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.steps = store, dict[int, list[str]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def fetch(self, ids: Sequence[str], step: int) -> Any:
        self.steps[step] = list(ids)
        return self.store.fetch(ids, step)


def test_rounds_leave_out_the_last_samples_epoch_by_epoch(source: FeatureStore, tmp_path: Path) -> None:
    order = source.ids[::-1]  # best first

    def seen(folder: Path, **more: Any) -> list[list[str]]:
        made, watched = head(), Seen(source)
        o = FAST.model_copy(
            update={"steps": None, "epochs": 4, "rounds": (1.0, 0.5, 0.25), "batch_positions": 32, **more}
        )
        o = o.model_copy(update={"row_length": 32})  # one sample a step
        found = train(made, objective(made, o), watched, order, dev(source), o, folder / "d", folder / "log", {})
        assert found["steps"] == len(watched.steps)
        return [ids for _, ids in sorted(watched.steps.items())]

    steps = seen(tmp_path / "rounds")
    names = [name for ids in steps for name in ids]
    sizes = [8, 4, 2, 2]
    assert len(names) == sum(sizes)
    for epoch, size in enumerate(sizes):
        part = names[sum(sizes[:epoch]) : sum(sizes[: epoch + 1])]
        assert set(part) == set(order[:size])
    # without them every epoch sees everything, in the order in which it always did
    plain = [name for ids in seen(tmp_path / "plain", rounds=()) for name in ids]
    assert sorted(plain) == sorted(order * 4)
    assert plain[:8] == names[:8]


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainOptions(steps=40, learning_rate=2.0, warmup=0.1)
    found = [learning_rate(step, 40, options) for step in range(40)]
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx([1.0 + math.cos(math.pi * n / 36) for n in range(36)])
    assert found[4] == 2.0
    assert 0 < found[-1] < 0.01
    assert [learning_rate(0, 1, options), learning_rate(0, 3, options)] == [2.0, 2.0], "never a step with rate 0"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give steps, seconds or epochs"),
        ({"steps": 3, "seconds": 2.0}, "only one of steps, seconds and epochs can be given; set the others to null"),
        ({"epochs": 3, "seconds": 2.0}, "only one of steps, seconds and epochs can be given"),
        ({"steps": 3, "weights": {"name": "flatness", "fraction": 0.4}}, "'flatness' have no option 'fraction'"),
        ({"steps": 3, "weights": {"name": "delta-loss", "fraction": 2}}, "fraction must be above 0 and at most 1"),
        ({"steps": 3, "loss": "forward-lk"}, "no loss is called 'forward-lk'; did you mean 'forward-kl'?"),
    ],
)
def test_options_are_checked_before_anything_runs(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate(TrainOptions, given, "the command line")


def test_an_override_replaces_a_time_box_by_steps() -> None:
    found = validate(TrainOptions, override({"seconds": 300}, ["steps=30", "seconds=null"]), "the command line")
    assert (found.steps, found.seconds) == (30, None)


def test_a_head_learns_eight_answers_by_heart(source: FeatureStore, tmp_path: Path) -> None:
    """α₁ ≥ 0.95 within 400 steps; the second and third drafted token, taught by the unrolled steps, follow."""
    untrained = metrics.count(replay(Single(head().eval(), ChainGrowth(3)), tiny_target().spec, dev(source).answers))
    options = FAST.model_copy(update={"steps": 400, "learning_rate": 1e-2})
    folder = trained(source, tmp_path, options)
    learnt = load_drafter(folder, tiny_target())
    found = metrics.count(replay(Single(learnt, ChainGrowth(3)), tiny_target().spec, dev(source).answers))
    assert untrained.acceptance_by_depth[0] < 0.5, "a head that knows nothing yet would make this test worthless"
    assert found.acceptance_by_depth[0] >= 0.95
    assert min(found.acceptance_by_depth) >= 0.9
    assert len(found.acceptance_by_depth) == 3
    summary = artefacts.read_json(folder / "training.json")
    assert summary["dev_acceptance_length"] == pytest.approx(found.acceptance_length)


def test_the_best_checkpoint_is_kept(source: FeatureStore, tmp_path: Path) -> None:
    """A learning rate that rises until it destroys the head: the last weights are not what is kept."""
    wild = {"steps": 40, "evaluations": 4, "learning_rate": 1.0, "warmup": 0.9}
    folder = trained(source, tmp_path, FAST.model_copy(update=wild))
    logged = [row for row in artefacts.read_jsonl(tmp_path / "log.jsonl") if "dev_acceptance_length" in row]
    lengths = [row["dev_acceptance_length"] for row in logged]
    assert [row["step"] for row in logged] == [10, 20, 30, 40]
    assert lengths[-1] < max(lengths), "the last is not the best"
    summary = artefacts.read_json(folder / "training.json")
    assert summary["dev_acceptance_length"] == max(lengths)
    assert summary["best_step"] == logged[lengths.index(max(lengths))]["step"]
    learnt = load_drafter(folder, tiny_target())
    found = metrics.count(replay(Single(learnt, ChainGrowth(3)), tiny_target().spec, dev(source).answers))
    assert found.acceptance_length == pytest.approx(max(lengths))


def test_a_step_divides_by_what_counts_and_logs_it(source: FeatureStore, tmp_path: Path) -> None:
    trained(source, tmp_path)
    rows = [row for row in artefacts.read_jsonl(tmp_path / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(len(row["loss_by_step"]) == 3 for row in rows)
    assert [row["lr"] for row in rows] == [learning_rate(step, 4, FAST) for step in range(4)]
    # a fresh head is nothing like the target: a mean loss of some nats, whatever the batch's size
    assert all(0.1 < row["loss"] < 20 for row in rows)


def test_samples_that_teach_nothing_are_passed_over(source: FeatureStore, tmp_path: Path) -> None:
    """Answers of one token, as a target that stops at once writes them, in a batch of their own or beside others."""
    short = [Sample(f"short{n}", [9, 10, 11, 7], [False] * 3 + [True], True) for n in range(4)]
    good = answered(2, 12, seed=4)
    mixed = stored([*short, *good], tmp_path / "mixed")
    options = FAST.model_copy(update={"row_length": 16, "batch_positions": 16})
    place = tmp_path / "mixed"
    made = head()
    replayed = Dev(tiny_target().spec, [stored_answer(mixed[s.id]) for s in good], ChainGrowth(2))
    train(made, objective(made), mixed, mixed.ids, replayed, options, place / "drafter", place / "log.jsonl", {})
    only = stored(short, tmp_path / "only")
    with pytest.raises(UserError, match="none of the 4 samples to train on teaches anything"):
        train(made, objective(made), only, only.ids, replayed, options, place / "other", place / "log.jsonl", {})


def test_dev_answers_that_hold_no_round_are_refused(source: FeatureStore, tmp_path: Path) -> None:
    short = [Sample(f"short{n}", [9, 10, 11, 7], [False] * 3 + [True], True) for n in range(2)]
    answers = [stored_answer(sample) for sample in stored(short, tmp_path)]
    made = head()
    with pytest.raises(UserError, match="none of the 2 dev answers is longer than one token"):
        train(
            made,
            objective(made),
            source,
            source.ids,
            replace(dev(source), answers=answers),
            FAST,
            tmp_path / "drafter",
            tmp_path / "log.jsonl",
            {},
        )
    assert not (tmp_path / "drafter").exists()


def test_a_time_box_fixes_the_number_of_steps_and_leaves_no_trace_of_the_probe(
    source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "OVERRUN", math.inf)  # a slow moment of the machine is not what is tested here
    boxed = trained(source, tmp_path / "boxed", FAST.model_copy(update={"steps": None, "seconds": 0.4}))
    steps = artefacts.read_json(boxed / "training.json")["steps"]
    assert steps >= 10
    counted = trained(source, tmp_path / "counted", FAST.model_copy(update={"steps": steps}))
    for name in ("model.safetensors", "training.json"):
        assert (boxed / name).read_bytes() == (counted / name).read_bytes()


def test_an_overrun_time_box_ends_training_early(
    source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps timed on an idle machine would take for ever on a busy one."""
    monkeypatch.setattr(trainer._Training, "probe", lambda self, seconds: 1000)
    folder = trained(source, tmp_path, FAST.model_copy(update={"steps": None, "seconds": 1e-6}))
    assert artefacts.read_json(folder / "training.json")["best_step"] == 1
    assert "training ends at step 1 of 1000" in capsys.readouterr().err
