"""The training loop of any drafter and objective: packed batches, token weights, AdamW; the best checkpoint is kept.

Everything that a step does follows from its number (batches, learning rate, draws), so that a run that was killed goes
on from its last state and ends in the same weights. Given a time box instead of a number of steps, three steps are
timed first and the number is fixed and written down before training starts.

A step's rows are shared out among the ranks, and by each into parts that are passed one after another. Rows are counted
over all of them before the first is passed, and gradients summed, so that neither changes more than rounding.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from draftsmith.drafters import checkpoint
from draftsmith.drafters.checkpoint import Saved
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.selection.tokens import DeltaLoss
from draftsmith.training import state
from draftsmith.training.account import Account, Before
from draftsmith.training.batches import epoch_plan
from draftsmith.training.dev import Dev, acceptance_length
from draftsmith.training.objectives.base import Changing, Objective, SampleSource, StepLosses, compared
from draftsmith.training.options import TrainOptions, autocast, learning_rate
from draftsmith.training.trackers import Log

PROBE_STEPS = 3
OVERRUN = 1.3  # how far a time box may be overrun before the planned steps are given up
SAVE_SECONDS = 120.0  # a kill loses no more than this; when states are saved changes no result
STATE = "state.safetensors"
MOST_STEPS, MOST_TERMS = 16, 64  # what ranks send each other has one length, also where a rank has no rows


def train(
    drafter: nn.Module,
    objective: Objective,
    source: SampleSource,
    kept: Sequence[str],
    dev: Dev,
    options: TrainOptions,
    out: Path,
    log: Path,
    meta: dict[str, object],
    *,
    reference: Objective | None = None,
    track: Log | None = None,
    account: Account | None = None,
    before: Before | None = None,
    judged_first: bool = False,
) -> dict[str, Any]:
    """Train a drafter on the source's samples `kept` and write the best checkpoint as the artefact `out` ("drafter").

    Args:
        drafter: a `checkpoint.Saved`, in float32; its parameters that want a gradient are trained.
        kept: ids; best first where `options.rounds` leaves out the last ones of them.
        objective: gives the terms of the loss.
        log: metrics, a JSON row a step and an evaluation.
        meta: what identifies inputs; the options are added.
        reference: the same objective with a frozen drafter, for token weights that compare losses with its own.
        track: is told the log's rows, too.
        account: is told what training costs; the source may tell it, too.
        before: what was spent before this training for its sake (a reference).
        judged_first: judge the drafter as it comes, too; it stays where training does not make it better.

    Returns:
        The summary that is also in the artefact, as `training.json`.

    Raises:
        UserError: no sample teaches anything, or no dev answer can be replayed.
        SystemExit: with code 0, after SIGTERM: the state is saved, and the same call goes on from it.
    """
    described = checkpoint.identity(cast(Saved, drafter), dev.spec.fingerprint)
    identity = {**meta, **described, "train": options.model_dump(mode="json")}
    with artefacts.writing(out, checkpoint.KIND, identity, resume=True, together=True) as scratch:
        work = scratch / artefacts.WORK
        run = _Training(drafter, objective, source, kept, dev, options, work / STATE, log, reference, track, account)
        length = work / "steps.json"
        known = int(ranks.first(artefacts.read_json(length) if length.is_file() else 0))
        steps = known or run.planned()
        if not known and ranks.rank() == 0:
            artefacts.write_json(length, steps)
        done = run.run(steps, judged_first)
        summary: dict[str, Any] = {"steps": steps, "best_step": done.best_step, "dev_acceptance_length": done.best}
        summary["cost"] = {**run.account.over_ranks(), **({"before": dict(before.counts)} if before else {})}
        if ranks.rank() == 0:
            checkpoint.write(cast(Saved, drafter), scratch, done.best_weights)
            artefacts.write_json(scratch / "training.json", summary)
            measured = {"seconds": round(run.account.seconds, 3), "before": dict(before.seconds) if before else {}}
            artefacts.write_json(scratch / artefacts.MEASURED, measured)
    return summary


def step_seconds(
    drafter: nn.Module,
    objective: Objective,
    source: SampleSource,
    kept: Sequence[str],
    dev: Dev,
    options: TrainOptions,
    reference: Objective | None = None,
) -> tuple[float, float]:
    """Seconds of an optimiser step and of an evaluation on this machine, from three steps that move nothing."""
    nowhere = Path()
    return _Training(drafter, objective, source, kept, dev, options, nowhere, nowhere, reference, None).timed()


class _Training:
    """A run's moving parts."""

    def __init__(
        self,
        drafter: nn.Module,
        objective: Objective,
        source: SampleSource,
        kept: Sequence[str],
        dev: Dev,
        options: TrainOptions,
        saved: Path,
        log: Path,
        reference: Objective | None,
        track: Log | None,
        account: Account | None = None,
    ) -> None:
        self.drafter, self.objective, self.source, self.dev, self.options = drafter, objective, source, dev, options
        self.saved, self.log, self.track, self.account = saved, log, track, account or Account()
        # an average of the weights judges by the objective that they are trained by
        self.reference = objective if options.reference == "ema" else reference
        self.kept = [i for i in kept if objective.teaches(source.outline(i))]
        if not self.kept:
            raise UserError(
                f"none of the {len(kept)} samples to train on teaches anything (a head needs two answer tokens in a "
                "row): look at some with `draftsmith inspect`"
            )
        lengths = dict(zip(source.ids, source.lengths, strict=True))
        self.lengths = [lengths[i] for i in self.kept]
        self.parameters = {name: p for name, p in drafter.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.weights = options.weights.build()
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            foreach=True,
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if options.ema else None
        self.progress = state.Progress()

    def plan(self, epoch: int) -> list[list[list[int]]]:
        """An epoch's batches, over all ranks."""
        o = self.options
        lengths = self.lengths[: o.seen(len(self.lengths), epoch)]
        return epoch_plan(lengths, o.row_length, o.batch_positions, o.seed, epoch)

    def batches(self, first: int) -> Iterator[list[Any]]:
        """This rank's parts of each step's batch from step `first` on, epoch after epoch."""
        step = epoch = 0
        while True:
            for rows in self.plan(epoch):
                if step >= first:
                    yield self.fetched(rows, step)
                step += 1
            epoch += 1

    def fetched(self, rows: Sequence[Sequence[int]], step: int) -> list[Any]:
        own = [[self.kept[i] for i in row] for row in ranks.share(rows)]
        samples = iter(self.source.fetch([i for row in own for i in row], step))
        filled = [[next(samples) for _ in row] for row in own]
        parts = [filled[n :: self.options.accumulation] for n in range(self.options.accumulation)]
        return [self.objective.collate(part, self.device) for part in parts if part]

    def planned(self) -> int:
        """How many steps the options mean."""
        o = self.options
        if o.epochs is not None:
            return sum(len(self.plan(epoch)) for epoch in range(o.epochs))
        return o.steps or self.probe(o.seconds or 0.0)

    def step(self, parts: Sequence[Any], number: int, rate: float) -> dict[str, list[float]]:
        """One optimiser step; returns each term's mean loss at each unrolled step, before token weights."""
        o = self.options
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        counts = self._counts(parts)
        sums: dict[tuple[str, int], Tensor] = {}
        for part in self._in_step(parts):
            with self._precision():
                loss = torch.zeros((), device=self.device)
                for term in self.terms(part, number):
                    weights = self.weights(term.values, term.facts, term.step)
                    loss = loss + term.weight * (weights * term.values).sum() / max(counts[term.step], 1.0)
                    key = (term.name, term.step)
                    sums[key] = sums.get(key, torch.zeros_like(loss)) + term.values.detach().sum()
            loss.backward()
            self.account.add("draft", "trained", passes=1, tokens=part.positions)
        ranks.sum_gradients(self.parameters.values())
        if o.clip_by == "norm":
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), o.clip)
        else:
            torch.nn.utils.clip_grad_value_(self.parameters.values(), o.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach(), 1 - o.ema)
        return _means(sums, counts)

    def _in_step(self, parts: Sequence[Any]) -> Iterator[Any]:
        """The parts; where token weights compare rows over ranks, those with fewer parts follow the others."""
        if ranks.world() == 1 or not getattr(self.weights, "together", False):
            yield from parts
            return
        weights = cast(DeltaLoss, self.weights)
        for number in range(int(ranks.first(len(parts)))):  # rank 0 has most
            if number < len(parts):
                yield parts[number]
            weights.follow(number < len(parts), self.device)

    def terms(self, part: Any, number: int) -> Iterator[StepLosses]:
        """The objective's terms, each with the reference's losses where there is a reference."""
        draw = (self.options.seed, number)
        if self.reference is None:
            yield from self.objective.losses(part, draw)
            return
        with torch.no_grad(), self._averaged():
            known = [compared(term) for term in self.reference.losses(part, draw)]
        self.account.add("reference", "judged", passes=1, tokens=part.positions)
        for term, values in zip(self.objective.losses(part, draw), known, strict=True):
            yield replace(term, facts=replace(term.facts, reference_losses=values))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the trained ones' place, where they are the reference."""
        pairs = [] if self.options.reference != "ema" else [(self.parameters[n], t) for n, t in self._weights().items()]
        kept = [parameter.data for parameter, _ in pairs]
        try:
            for parameter, average in pairs:
                parameter.data = average.data
            yield
        finally:
            for (parameter, _), data in zip(pairs, kept, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()  # autocast's copies are known by parameter: these are the average's

    def _counts(self, parts: Sequence[Any]) -> list[float]:
        """Rows at each unrolled step, over all ranks and parts."""
        own = [float(sum(step)) for step in zip(*(part.counts for part in parts), strict=True)]
        return ranks.sums(own, MOST_STEPS)

    def probe(self, seconds: float) -> int:
        """How many steps fit into a time box."""
        step, evaluation = self.timed()
        left = seconds - self.options.evaluations * evaluation
        return int(ranks.first(max(10, max(left, 0.2 * seconds) // step)))

    def timed(self) -> tuple[float, float]:
        """Seconds of a step with its fetching, the best of three that move nothing (at a learning rate of 0), and of an
        evaluation."""
        times: list[float] = []
        started = time.perf_counter()
        for number, parts in enumerate(self.batches(0)):
            self.step(parts, number, 0.0)
            times.append(time.perf_counter() - started)
            if number + 1 == PROBE_STEPS:
                break
            started = time.perf_counter()
        self.optimiser.state.clear()
        self.weights = self.options.weights.build()
        self.account.resume({})
        if isinstance(self.source, Changing):
            self.source.resume({})
        started = time.perf_counter()
        self.evaluate()
        return min(times[1:] or times), time.perf_counter() - started

    def run(self, steps: int, judged_first: bool = False) -> state.Progress:
        """Train from the last state (or the start) to the end."""
        first = self._restore()
        every = max(1, math.ceil(steps / self.options.evaluations))
        rows = self._logged(first)
        if first and (self._given_up() or self._overdue(rows)):
            steps = first  # it had ended, but for its artefact
        if judged_first and not first:
            self._judge(rows, 0.0)
        started = saved = begun = time.perf_counter()
        with console.progress("training", steps, "steps", done=first) as bar, _terminated() as stop:
            for step, parts in zip(range(first, steps), self.batches(first), strict=False):
                rate = learning_rate(step, steps, self.options)
                if hasattr(self.weights, "progress"):
                    self.weights.progress = step / steps
                losses = self.step(parts, step, rate)
                self.progress.step = step + 1
                seconds = time.perf_counter() - begun
                self.account.seconds += seconds
                by_step = next(iter(losses.values()), [math.nan])
                speed = sum(ranks.sums([part.positions for part in parts], self.options.accumulation)) / seconds
                self._log(
                    rows,
                    {
                        "step": step + 1,
                        "loss": by_step[0],
                        "loss_by_step": by_step,
                        **({"terms": losses} if len(losses) > 1 else {}),
                        "lr": rate,
                        "seconds": seconds,
                        "positions_per_second": speed,
                    },
                )
                bar.advance(1, loss=round(by_step[0], 3), **{"tokens/s": round(speed)})
                overdue = self._overdue(rows)
                last = overdue or step + 1 == steps
                if (step + 1) % every == 0 or last:
                    found = self._judge(rows, time.perf_counter() - started)
                    bar.note(f"step {step + 1}: acceptance length on dev {found:.3f}")
                    last = last or self._given_up()
                    saved = -math.inf
                stopped = any(ranks.sums([stop.is_set()]))
                if stopped or time.perf_counter() - saved >= SAVE_SECONDS:
                    self._save(rows)
                    saved = time.perf_counter()
                if stopped:
                    console.say(f"terminated at step {step + 1} of {steps}; the same command goes on from there")
                    raise SystemExit(0)
                if last:
                    self._say_why(step + 1, steps, overdue)
                    break
                begun = time.perf_counter()  # the next step's samples are fetched from here on
        if ranks.rank() == 0:
            artefacts.write_jsonl(self.log, rows)
        return self.progress

    def _judge(self, rows: list[dict[str, Any]], seconds: float) -> float:
        """Evaluate, log, and remember the weights if they are the best."""
        progress = self.progress
        found = self.evaluate()
        self._log(rows, {"step": progress.step, "dev_acceptance_length": found, "seconds": seconds})
        progress.since_best += 1
        if found > progress.best:
            progress.best, progress.best_step, progress.since_best = found, progress.step, 0
            progress.best_weights = {n: t.detach().clone() for n, t in self._weights().items()}
        return found

    def _given_up(self) -> bool:
        return self.options.patience is not None and self.progress.since_best >= self.options.patience

    def _say_why(self, step: int, steps: int, overdue: bool) -> None:
        if step == steps:
            return
        if overdue:
            console.warn(
                f"training ends at step {step} of {steps}: the machine was much slower than when its steps "
                "were timed, and the time box is used up"
            )
        else:
            console.say(f"training ends at step {step} of {steps}: no better since step {self.progress.best_step}")

    def _overdue(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether a time box was overrun so far that the planned steps are given up."""
        if self.options.seconds is None:
            return False
        spent = ranks.first(sum(float(row["seconds"]) for row in rows if "loss" in row))
        return spent > OVERRUN * self.options.seconds

    def evaluate(self) -> float:
        """Acceptance length on the dev answers by replay, in the number format of the deployment."""
        return acceptance_length(self.drafter, self._weights(), self.dev)

    def _log(self, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        if self.track is not None:
            self.track(row)

    def _logged(self, step: int) -> list[dict[str, Any]]:
        """The log's rows up to a step. The log is for people: where it was lost or edited, it begins here."""
        try:
            return [row for row in artefacts.read_jsonl(self.log) if int(row["step"]) <= step] if step else []
        except (UserError, KeyError, TypeError, ValueError):
            return []

    def _weights(self) -> Mapping[str, Tensor]:
        return self.average if self.average is not None else self.parameters

    def _precision(self) -> AbstractContextManager[Any]:
        return autocast(self.options.precision, self.device)

    def _save(self, rows: Sequence[dict[str, Any]]) -> None:
        if ranks.rank() > 0:
            return
        self.progress.thresholds = getattr(self.weights, "thresholds", {})
        self.progress.cost = self.account.to_row()
        if isinstance(self.source, Changing):
            self.progress.source = self.source.state()
        artefacts.write_jsonl(self.log, rows)
        state.save(self.saved, self.parameters, self.average, self.optimiser, self.progress)

    def _restore(self) -> int:
        self.progress = state.restore(self.saved, self.parameters, self.average, self.optimiser)
        if self.progress.thresholds:
            cast(Any, self.weights).thresholds = dict(self.progress.thresholds)
        if self.progress.step:
            self.account.resume(self.progress.cost)
            if isinstance(self.source, Changing):
                self.source.resume(self.progress.source)
            console.say(f"going on from step {self.progress.step}")
        return self.progress.step


def _means(sums: Mapping[tuple[str, int], Tensor], counts: Sequence[float]) -> dict[str, list[float]]:
    """Each term's mean loss at each unrolled step over all ranks, from this rank's sums in the order of the terms."""
    found: dict[str, list[float]] = {}
    values = ranks.sums([float(value) for value in sums.values()], MOST_TERMS)
    for (name, step), value in zip(sums, values, strict=False):
        found.setdefault(name, []).append(value / max(counts[step], 1.0))
    return found


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """Is set by SIGTERM while the block runs; in a thread other than the main one nothing can be set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
