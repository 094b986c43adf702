"""The training loop: packed batches, unrolled steps, AdamW with warm-up and cosine; the best checkpoint is kept.

Everything that a step does follows from its number (batches, learning rate), so that a run that was killed goes on from
its last state and ends in the same weights. Given a time box instead of a number of steps, three steps are timed first
and the number is fixed and written down before training starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from draftsmith.data.features import FeatureStore
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import Growth
from draftsmith.drafters import checkpoint
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.numerics import losses
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.replay import StoredAnswer
from draftsmith.training.batches import TrainBatch, collate, counted_starts, epoch_plan
from draftsmith.training.objectives.eagle3 import Eagle3Objective, combined

PROBE_STEPS = 3
OVERRUN = 1.3  # how far a time box may be overrun before the planned steps are given up
SAVE_SECONDS = 120.0  # a kill loses no more than this; when states are saved changes no result
STATE = "state.safetensors"


class TrainOptions(Options):
    """How a head is trained. Either `steps` or `seconds` says how long."""

    steps: int | None = Field(default=None, ge=1, description="optimiser steps")
    seconds: float | None = Field(
        default=None, gt=0, description="time box: the number of steps is fixed after three timed ones"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="the largest, after warm-up")
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps with a rising learning rate; cosine to 0 after it"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    unroll_steps: int = Field(default=4, ge=1, le=8, description="training-time test: drafted tokens in a row")
    step_decay: float = Field(default=0.8, gt=0, le=1, description="weight of step k is this to the power k")
    detach_steps: bool = Field(default=False, description="no gradient from one unrolled step to the one before")
    loss: str = Field(default="forward-kl", description="divergence from the target's distribution")
    row_length: int = Field(default=512, ge=16, description="positions of a packed row")
    batch_positions: int = Field(default=2048, ge=16, description="positions of a step")
    precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the matrix products; weights are float32"
    )
    evaluations: int = Field(
        default=6, ge=1, description="replays of the dev answers during training, the last at the end"
    )
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the averaged weights, which are then validated and kept; 0: none"
    )
    seed: int = 0

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: str) -> str:
        try:
            losses.by_name(loss)
        except UserError as problem:
            raise ValueError(str(problem)) from None
        return loss

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.seconds is None:
            raise ValueError("give steps or seconds: how long to train")
        if self.steps is not None and self.seconds is not None:
            raise ValueError("only one of steps and seconds can be given; set the other to null (train.seconds=null)")
        return self


@dataclass(frozen=True)
class Dev:
    """What checkpoints are chosen by: acceptance length on stored answers, with the growth of the deployment."""

    spec: TargetSpec
    answers: Sequence[StoredAnswer]
    growth: Growth


def train(
    head: Eagle3,
    teacher_weight: Tensor,
    source: FeatureStore,
    kept: Sequence[str],
    dev: Dev,
    options: TrainOptions,
    out: Path,
    log: Path,
    meta: dict[str, object],
) -> dict[str, Any]:
    """Train a head on the store's samples `kept` and write the best checkpoint as the artefact `out` (kind "drafter").

    Args:
        head: freshly initialised; float32.
        teacher_weight: `[Vd, H]` rows of the target's output embedding for the draft vocabulary.
        log: metrics, a JSON row a step and an evaluation.
        meta: what identifies inputs; the options are added.

    Returns:
        The summary that is also in the artefact, as `training.json`.

    Raises:
        UserError: no sample teaches anything, or no dev answer can be replayed.
    """
    identity = {**meta, **checkpoint.identity(head, dev.spec.fingerprint), "train": options.model_dump(mode="json")}
    with artefacts.writing(out, checkpoint.KIND, identity, resume=True) as scratch:
        work = scratch / artefacts.WORK
        run = _Training(head, teacher_weight, source, kept, dev, options, work / STATE, log)
        length = work / "steps.json"
        if not length.is_file():
            artefacts.write_json(length, options.steps or run.probe(options.seconds or 0.0))
        steps = int(artefacts.read_json(length))
        best = run.run(steps)
        checkpoint.write(head, scratch, best)
        summary = {"steps": steps, "best_step": run.best_step, "dev_acceptance_length": run.best}
        artefacts.write_json(scratch / "training.json", summary)
    return summary


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine to 0."""
    warm = max(1, round(options.warmup * steps))
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Training:
    """A run's moving parts."""

    def __init__(
        self,
        head: Eagle3,
        teacher_weight: Tensor,
        source: FeatureStore,
        kept: Sequence[str],
        dev: Dev,
        options: TrainOptions,
        state: Path,
        log: Path,
    ) -> None:
        self.head, self.source, self.dev, self.options, self.state, self.log = head, source, dev, options, state, log
        self.kept = [i for i in kept if bool(counted_starts(source[i].mask, 1).any())]
        if not self.kept:
            raise UserError(
                f"none of the {len(kept)} samples to train on has two answer tokens in a row, so there is nothing to "
                "learn from: look at some with `draftsmith inspect`"
            )
        lengths = dict(zip(source.ids, source.lengths, strict=True))
        self.lengths = [lengths[i] for i in self.kept]
        self.objective = Eagle3Objective(head, teacher_weight, losses.by_name(options.loss))
        self.optimiser = torch.optim.AdamW(
            head.parameters(),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            foreach=True,
        )
        self.average = {n: p.detach().clone() for n, p in head.named_parameters()} if options.ema else None
        self.best, self.best_step = 0.0, 0
        self.best_weights: dict[str, Tensor] = {}

    def batches(self, first: int) -> Iterator[TrainBatch]:
        """The step's batches from step `first` on, epoch after epoch."""
        o = self.options
        step = epoch = 0
        while True:
            plan = epoch_plan(self.lengths, o.row_length, o.batch_positions, o.seed, epoch)
            for rows in plan:
                if step >= first:
                    samples = [[self.source[self.kept[i]] for i in row] for row in rows]
                    yield collate(samples, self.head.wants, o.unroll_steps, self.head.device)
                step += 1
            epoch += 1

    def step(self, batch: TrainBatch, rate: float) -> list[float]:
        """One optimiser step; returns each unrolled step's mean loss."""
        o = self.options
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self._precision():
            sums = []
            for out in self.head.unroll(batch.unroll, o.unroll_steps, o.detach_steps):
                values, where = self.objective.token_losses(out, batch)
                sums.append((values.sum(), torch.tensor(float(where.shape[0]), device=values.device)))
            loss = combined(sums, o.step_decay)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), o.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            for name, parameter in self.head.named_parameters():
                self.average[name].lerp_(parameter.detach(), 1 - o.ema)
        return [float(value.detach() / count.clamp(min=1)) for value, count in sums]

    def probe(self, seconds: float) -> int:
        """How many steps fit into a time box, from three timed ones that move nothing (their learning rate is 0)."""
        times = []
        for number, batch in enumerate(self.batches(0)):
            started = time.perf_counter()
            self.step(batch, 0.0)
            times.append(time.perf_counter() - started)
            if number + 1 == PROBE_STEPS:
                break
        self.optimiser.state.clear()
        started = time.perf_counter()
        self.evaluate()
        replay_seconds = time.perf_counter() - started
        left = seconds - self.options.evaluations * replay_seconds
        return max(10, int(max(left, 0.2 * seconds) / min(times[1:] or times)))

    def run(self, steps: int) -> dict[str, Tensor]:
        """Train from the last state (or the start) to the end; returns the best weights."""
        first = self._restore()
        every = max(1, math.ceil(steps / self.options.evaluations))
        rows = self._logged(first)
        started = saved = time.perf_counter()
        with console.progress("training", steps, "steps", done=first) as bar:
            for step, batch in zip(range(first, steps), self.batches(first), strict=False):
                begun = time.perf_counter()
                rate = learning_rate(step, steps, self.options)
                by_step = self.step(batch, rate)
                seconds = time.perf_counter() - begun
                speed = batch.positions / seconds
                rows.append(
                    {
                        "step": step + 1,
                        "loss": by_step[0],
                        "loss_by_step": by_step,
                        "lr": rate,
                        "seconds": seconds,
                        "positions_per_second": speed,
                    }
                )
                bar.advance(1, loss=round(by_step[0], 3), **{"positions/s": round(speed)})
                overdue = self._overdue(rows)
                if (step + 1) % every == 0 or step + 1 == steps or overdue:
                    found = self.evaluate()
                    rows.append(
                        {"step": step + 1, "dev_acceptance_length": found, "seconds": time.perf_counter() - started}
                    )
                    bar.note(f"step {step + 1}: acceptance length on dev {found:.3f}")
                    if found > self.best:
                        self.best, self.best_step = found, step + 1
                        self.best_weights = {n: t.detach().clone() for n, t in self._weights().items()}
                    saved = -math.inf
                if time.perf_counter() - saved >= SAVE_SECONDS:
                    self._save(step + 1, rows)
                    saved = time.perf_counter()
                if overdue and step + 1 < steps:
                    console.warn(
                        f"training ends at step {step + 1} of {steps}: the machine was much slower than when its steps "
                        "were timed, and the time box is used up"
                    )
                    break
        artefacts.write_jsonl(self.log, rows)
        return self.best_weights

    def _overdue(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether a time box was overrun so far that the planned steps are given up."""
        if self.options.seconds is None:
            return False
        return sum(float(row["seconds"]) for row in rows if "loss" in row) > OVERRUN * self.options.seconds

    @torch.no_grad()
    def evaluate(self) -> float:
        """Acceptance length on the dev answers by replay, in the number format of the deployment.

        Raises:
            UserError: there is no round in them.
        """
        own = self.head.state_dict()
        copy = Eagle3(self.head.options, self.head.vocab, self.head.embedding)
        copy.load_state_dict({**own, **self._weights()})
        copy = copy.to(self.head.device, getattr(torch, self.dev.spec.dtype)).eval()
        generations = replay(Single(copy, self.dev.growth), self.dev.spec, self.dev.answers)
        found = metrics.count(generations).acceptance_length
        if math.isnan(found):
            raise UserError(
                f"none of the {len(self.dev.answers)} dev answers is longer than one token, so checkpoints can't be "
                "compared: take more dev prompts (data.dev) or longer answers (regenerate.max_new_tokens)"
            )
        return found

    def _logged(self, step: int) -> list[dict[str, Any]]:
        """The log's rows up to a step. The log is for people: where it was lost or edited, it begins here."""
        try:
            return [row for row in artefacts.read_jsonl(self.log) if int(row["step"]) <= step] if step else []
        except (UserError, KeyError, TypeError, ValueError):
            return []

    def _weights(self) -> dict[str, Tensor]:
        return self.average if self.average is not None else dict(self.head.named_parameters())

    def _precision(self) -> AbstractContextManager[Any]:
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast(self.head.device.type, torch.bfloat16)

    def _save(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.head.named_parameters():
            tensors[f"weight.{name}"] = parameter
            if self.best_weights:
                tensors[f"best.{name}"] = self.best_weights[name]
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimiser.state[parameter][key]
            if self.average is not None:
                tensors[f"average.{name}"] = self.average[name]
        artefacts.write_jsonl(self.log, rows)
        metadata = {"step": str(step), "best_step": str(self.best_step), "best": repr(self.best)}
        artefacts.save_tensors(self.state, tensors, metadata)

    def _restore(self) -> int:
        if not self.state.is_file():
            return 0
        metadata = artefacts.load_metadata(self.state)
        tensors = artefacts.load_tensors(self.state)
        step = int(metadata["step"])
        with torch.no_grad():
            for name, parameter in self.head.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                if f"best.{name}" in tensors:
                    self.best_weights[name] = tensors[f"best.{name}"].to(parameter.device)
                if self.average is not None:
                    self.average[name].copy_(tensors[f"average.{name}"])
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
                }
        self.best, self.best_step = float(metadata["best"]), int(metadata["best_step"])
        console.say(f"going on from step {step}")
        return step
