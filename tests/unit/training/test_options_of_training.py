"""What the trainer's options do to a run: parts, lengths, early stops, token weights, termination, trackers."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.data.features import FeatureStore
from draftsmith.decoding.composition import Single
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.selection.tokens import DeltaLoss, RowFacts, WeightOptions
from draftsmith.training import trackers
from draftsmith.training.batches import TrainBatch, epoch_plan
from draftsmith.training.dev import DeployOptions, deployed
from draftsmith.training.objectives.base import StepLosses
from draftsmith.training.options import TrainOptions, learning_rate
from draftsmith.training.trackers import TrackingOptions, tracking
from draftsmith.training.trainer import train
from tests.tiny import tiny_target
from tests.unit.training.stored import answered, stored
from tests.unit.training.test_trainer import FAST, dev, head, objective, trained


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Twelve answers of 12 tokens: some six rows of 32 positions."""
    return stored(answered(12, 12), tmp_path_factory.mktemp("options"))


def changed(**options: Any) -> TrainOptions:
    return validate(TrainOptions, {**FAST.model_dump(), "row_length": 32, "batch_positions": 128, **options}, "test")


def weights(folder: Path) -> dict[str, Tensor]:
    return artefacts.load_tensors(folder / "model.safetensors")


def logged(folder: Path) -> list[dict[str, Any]]:
    return [row for row in artefacts.read_jsonl(folder.parent / "log.jsonl") if "loss" in row]


def test_a_step_in_parts_is_the_same_step(source: FeatureStore, tmp_path: Path) -> None:
    """Rows are counted over all parts: a part with few of them does not count more."""
    plan = epoch_plan(source.lengths, 32, 128, 0, 0)
    assert {len(rows) for rows in plan} != {1}, "there is something to part"
    whole = trained(source, tmp_path / "whole", changed(steps=1, clip=1e9))
    parts = trained(source, tmp_path / "parts", changed(steps=1, clip=1e9, accumulation=3))
    assert logged(whole)[0]["loss_by_step"] == pytest.approx(logged(parts)[0]["loss_by_step"], rel=1e-6)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], atol=2e-5, rtol=1e-5, msg=name)


class Terms:
    """Two terms at two steps, each row's loss one entry of the first parameter: gradients that can be told."""

    def __init__(self, drafter: Eagle3) -> None:
        self.inner, self.parameter = objective(drafter), next(drafter.parameters())
        self.reads, self.teaches, self.collate = self.inner.reads, self.inner.teaches, self.inner.collate

    def losses(self, batch: TrainBatch, draw: object) -> Iterator[StepLosses]:
        for step in (0, 1):
            ones = torch.ones(batch.counts[step])
            yield StepLosses("a", step, 0.5**step, self.parameter.flatten()[0] * ones, RowFacts())
            yield StepLosses("b", step, 3.0, self.parameter.flatten()[1] * ones, RowFacts())


@pytest.mark.parametrize("parts", [1, 2])
def test_each_term_is_divided_by_the_rows_of_its_step(
    source: FeatureStore, tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ weight · (1/N) Σ l of constant losses has the gradient Σ weight, whatever N and however many parts."""
    made, seen = head(), []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *more: Any) -> Any:
        gradient = next(made.parameters()).grad
        assert gradient is not None
        seen.append(gradient.flatten()[:2].tolist())
        return original(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    entries = next(made.parameters()).detach().flatten()[:2].tolist()
    o = changed(steps=1, accumulation=parts, clip=1e9)
    rows: list[Any] = []
    train(
        made,
        Terms(made),  # type: ignore[arg-type]
        source,
        source.ids,
        dev(source),
        o,
        tmp_path / "drafter",
        tmp_path / "log.jsonl",
        {},
        track=rows.append,
    )
    assert seen[0] == pytest.approx([1.5, 6.0])
    assert rows[0]["terms"] == {"a": pytest.approx([entries[0]] * 2), "b": pytest.approx([entries[1]] * 2)}


def test_epochs_mean_each_sample_so_often(source: FeatureStore, tmp_path: Path) -> None:
    folder = trained(source, tmp_path, changed(steps=None, epochs=3))
    expected = sum(len(epoch_plan(source.lengths, 32, 128, 0, epoch)) for epoch in range(3))
    assert artefacts.read_json(folder / "training.json")["steps"] == expected == len(logged(folder))


def test_a_constant_schedule_stays_where_the_warm_up_ended() -> None:
    options = changed(steps=40, learning_rate=2.0, warmup=0.1, schedule="constant")
    assert [learning_rate(s, 40, options) for s in range(40)] == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 37])


@pytest.mark.parametrize("by", ["norm", "value"])
def test_the_gradient_is_clipped(source: FeatureStore, tmp_path: Path, by: str, monkeypatch: Any) -> None:
    seen: list[Tensor] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *more: Any) -> Any:
        seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
        return original(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained(source, tmp_path / "free", changed(steps=1, clip=1e9))
    trained(source, tmp_path / "clipped", changed(steps=1, clip=0.01, clip_by=by))
    free, clipped = seen
    expected = free * (0.01 / free.norm()) if by == "norm" else free.clamp(-0.01, 0.01)
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped, expected, atol=1e-7, rtol=1e-4)


def test_training_ends_where_nothing_gets_better(
    source: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that destroys the head: the first evaluations are the best."""
    o = changed(steps=60, evaluations=30, learning_rate=1.0, patience=3)
    summary = artefacts.read_json(trained(source, tmp_path, o) / "training.json")
    rows = list(artefacts.read_jsonl(tmp_path / "log.jsonl"))
    last = rows[-1]["step"]
    assert last < 60
    assert last == summary["best_step"] + 3 * 2, "three evaluations, two steps each, after the best"
    assert f"training ends at step {last} of 60: no better since step {summary['best_step']}" in capsys.readouterr().out


class Reference:
    """An objective with a frozen head of another seed."""

    @staticmethod
    def made(o: TrainOptions) -> Any:
        torch.manual_seed(7)
        other = head()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return objective(other.requires_grad_(False), o)


@pytest.mark.parametrize("name", ["flatness", "delta-loss", "prefix-survival"])
def test_token_weights_reach_the_loss(source: FeatureStore, tmp_path: Path, name: str, monkeypatch: Any) -> None:
    """The gradient of the first step is that of Σ decay^k/N_k Σ w·l, w computed here from the facts."""
    o = changed(steps=1, clip=1e9, weights={"name": name})
    seen: list[dict[str, Tensor]] = []
    original = torch.optim.AdamW.step
    made = head()
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *more: (seen.append({n: p.grad.clone() for n, p in made.named_parameters()}), original(self))[1],
    )
    more = {"reference": Reference.made(o)} if name == "delta-loss" else {}
    log = tmp_path / "log.jsonl"
    train(made, objective(made, o), source, source.ids, dev(source), o, tmp_path / "drafter", log, {}, **more)
    fresh = head()
    own = objective(fresh, o)
    rows = epoch_plan(source.lengths, 32, 128, 0, 0)[0]
    batch = own.collate([[source[i] for i in row] for row in rows], torch.device("cpu"))
    references = [term.values for term in Reference.made(o).losses(batch, (0, 0))]
    total = torch.zeros(())
    for term, known in zip(own.losses(batch, (0, 0)), references, strict=True):
        values = term.values
        if name == "flatness":
            assert term.facts.flatness is not None
            w = term.facts.flatness / term.facts.flatness.mean()
        elif name == "prefix-survival":
            assert term.facts.survival is not None
            w = term.facts.survival
        else:
            delta = (values - known).detach()
            keep = len(delta) - int(torch.ceil(torch.tensor(0.6 * (len(delta) - 1) - 1e-9)))
            w = torch.zeros(len(delta))
            w[delta.argsort(descending=True, stable=True)[:keep]] = len(delta) / keep
        assert float(w.std()) > 0 or term.step == 0, "weights that do something"
        total = total + 0.8**term.step * (w.detach() * values).sum() / len(values)
    total.backward()
    for parameter, p in fresh.named_parameters():
        torch.testing.assert_close(seen[0][parameter], p.grad, atol=1e-6, rtol=1e-4, msg=parameter)


def test_weights_without_their_facts_are_refused(source: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need reference_losses of each row"):
        trained(source, tmp_path, changed(weights={"name": "delta-loss"}))


def test_terminated_it_goes_on_to_the_same_weights(
    source: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that has a state: averages, running thresholds, patience; SIGTERM at steps 3 and 5 of 9."""
    o = changed(
        steps=9, evaluations=4, ema=0.8, accumulation=2, patience=4, weights={"name": "delta-loss", "scope": "running"}
    )
    whole = trained(source, tmp_path / "whole", o, reference=Reference.made(o))

    def killing(at: int) -> Any:
        def track(row: Mapping[str, object]) -> None:
            if row["step"] == at and "loss" in row:
                os.kill(os.getpid(), signal.SIGTERM)

        return track

    before = signal.getsignal(signal.SIGTERM)
    for at in (3, 5):
        with pytest.raises(SystemExit) as ended:
            trained(source, tmp_path / "killed", o, reference=Reference.made(o), track=killing(at))
        assert ended.value.code == 0
        assert not (tmp_path / "killed" / "drafter").exists()
        assert f"terminated at step {at} of 9; the same command goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    again = trained(source, tmp_path / "killed", o, reference=Reference.made(o))
    assert "going on from step 5" in capsys.readouterr().out
    for name in ("model.safetensors", "training.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert [row["step"] for row in logged(again)] == list(range(1, 10))


def test_terminated_at_the_last_step_it_only_finishes(source: FeatureStore, tmp_path: Path) -> None:
    whole = trained(source, tmp_path / "whole")
    with pytest.raises(SystemExit):
        trained(source, tmp_path / "killed", track=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    for _ in range(3):
        with pytest.raises(SystemExit):
            trained(source, tmp_path / "killed", track=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    again = trained(source, tmp_path / "killed", track=lambda row: pytest.fail("there was nothing left to do"))
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_deployment_with_chains_is_what_checkpoints_are_chosen_by(source: FeatureStore, tmp_path: Path) -> None:
    growth = DeployOptions(server="vllm", speculative_tokens=2).growth.build()
    chosen = replace(dev(source), growth=growth)
    made = head()
    out = tmp_path / "drafter"
    found = train(made, objective(made), source, source.ids, chosen, FAST, out, tmp_path / "log", {})
    generations = replay(Single(load_drafter(out, tiny_target()), growth), tiny_target().spec, chosen.answers)
    assert found["dev_acceptance_length"] == metrics.count(generations).acceptance_length
    assert len(metrics.count(generations).offered_at_depth) == 2


def test_the_copy_to_decode_with_shares_the_embedding_and_nothing_else() -> None:
    made = head()
    new = {name: torch.full_like(p, 0.5) for name, p in made.named_parameters() if name == "fc.weight"}
    copy = deployed(made, new, torch.bfloat16)
    assert copy.embedding is made.embedding
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copy.parameters())
    assert torch.equal(copy.fc.weight, torch.full_like(copy.fc.weight, 0.5))
    own = {p.data_ptr() for p in made.parameters()}
    assert not any(p.data_ptr() in own for p in deployed(made, {}, torch.float32).parameters())
    assert copy.rotary is not made.rotary, "its tables may be made in inference mode, which training could not use"


def test_trackers_get_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)))
    wandb.init = lambda project, name: told.append((project, name)) or run  # type: ignore[attr-defined, func-returns-value]
    wandb.finish = lambda: told.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with tracking(TrackingOptions(trackers=("wandb",), project="p"), tmp_path / "run") as log:
        log({"step": 3, "loss": 1.5, "loss_by_step": [1.5, 2.0], "note": "text"})
    assert told == [("p", "run"), (3, {"loss": 1.5, "loss_by_step/0": 1.5, "loss_by_step/1": 2.0}), "finished"]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="names trackio, which is not installed: pip install trackio"):
        tracking(TrackingOptions(trackers=("trackio",)), tmp_path).__enter__()
    monkeypatch.setenv("RANK", "1")
    with tracking(TrackingOptions(trackers=("trackio",)), tmp_path) as log:
        log({"step": 1})


def test_weights_know_what_they_need() -> None:
    needs = {name: WeightOptions(name=name).build().needs for name in ("uniform", "flatness", "prefix-survival")}  # type: ignore[arg-type]
    assert needs == {"uniform": (), "flatness": ("flatness",), "prefix-survival": ("survival",)}
    assert trackers.split({"step": 2, "lr": 0.1}) == (2, {"lr": 0.1})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_average_judges_with_its_own_weights_and_nothing_else(
    source: FeatureStore, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """autocast keeps a bfloat16 copy of each parameter: that of the average must not stand in for the trained ones."""
    o = changed(steps=3, ema=0.5, reference="ema", precision=precision, weights={"name": "delta-loss"})
    seen: list[tuple[Tensor, Tensor]] = []
    original = DeltaLoss.__call__

    def call(self: DeltaLoss, losses: Tensor, facts: RowFacts, step: int) -> Tensor:
        assert facts.reference_losses is not None
        seen.append((losses.detach(), facts.reference_losses))
        return original(self, losses, facts, step)

    monkeypatch.setattr(DeltaLoss, "__call__", call)
    made = head()
    log, out = tmp_path / "log.jsonl", tmp_path / "drafter"
    train(made, objective(made, o), source, source.ids, dev(source), o, out, log, {})
    steps = o.unroll_steps
    for own, averaged in seen[:steps]:
        torch.testing.assert_close(own, averaged)  # before the first step the average is the weights themselves
    for own, averaged in seen[steps:]:
        assert (own - averaged).abs().max() > 1e-4
