"""AdaSPEC's reference (2510.19779, §3): a drafter of the same shape, trained plainly, whose losses show which tokens a
drafter of that size can learn. Its losses are computed once, stored, and come back with the samples.

What is stored of a token is what token weights compare: the trained divergence, or the one that judges (`judged`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.data.features import StoredSample, plan
from draftsmith.drafters import checkpoint
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.selection.tokens import WeightOptions
from draftsmith.training.account import Account, Before
from draftsmith.training.batches import REFERENCE
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective, SampleSource, compared
from draftsmith.training.options import TrainOptions, autocast
from draftsmith.training.trainer import train

KIND = "reference-losses"
DRAW = ("reference", 2**31 - 1)  # the last step there can be: what is trained in phases is judged as in its last


def trained(
    fresh: Callable[[], nn.Module],
    load: Callable[[Path], nn.Module],
    objective_of: Callable[[Any, TrainOptions], Objective],
    source: SampleSource,
    kept: Sequence[str],
    dev: Dev,
    options: TrainOptions,
    folder: Path,
    meta: Mapping[str, object],
) -> tuple[WithReference, Before]:
    """Train a reference and store its losses, each an artefact of its own; what is there already is not made again.

    It begins as the drafter does and is trained as long, on the same samples in the same order, by the divergence that
    judges and without token weights.

    Args:
        fresh: makes the untrained drafter; load: a trained one from its artefact, in float32.
        objective_of: the objective of a drafter under options.
        options: of the training that the reference is for.
        folder: gets `reference`, `reference-losses` and `reference.jsonl`.
        meta: what identifies the inputs.

    Returns:
        The source with the losses, and what the reference cost.
    """
    plain = options.model_copy(
        update={
            "weights": WeightOptions(),
            "reference": None,
            "loss": options.judge or options.loss,
            "judge": None,
        }
    )
    place, losses = folder / "reference", folder / "reference-losses"
    own: dict[str, object] = {**meta, "role": "reference"}
    if not _there(place, checkpoint.KIND, {**own, "train": plain.model_dump(mode="json")}):
        console.say("first a reference: the same drafter, trained plainly")
        drafter = fresh()
        train(drafter, objective_of(drafter, plain), source, kept, dev, plain, place, folder / "reference.jsonl", own)
    known = {"reference": artefacts.checksum(place)}
    if not _there(losses, KIND, known):
        reference = load(place)
        device = next(reference.parameters()).device
        store_losses(objective_of(reference, plain), source, kept, plain, losses, known, device)
    counts = {
        "reference": artefacts.read_json(place / "training.json")["cost"],
        "reference losses": artefacts.read_json(losses / "cost.json"),
    }
    folders = zip(counts, (place, losses), strict=True)
    seconds = {name: float(artefacts.read_json(made / artefacts.MEASURED)["seconds"]) for name, made in folders}
    return WithReference(source, losses, known), Before(counts, seconds)


def _there(folder: Path, kind: str, expect: Mapping[str, object]) -> bool:
    """Whether there is a whole artefact of the same inputs and options."""
    try:
        artefacts.opened(folder, kind, expect)
    except UserError:
        return False
    return True


@torch.no_grad()
def store_losses(
    reference: Objective,
    source: SampleSource,
    kept: Sequence[str],
    options: TrainOptions,
    out: Path,
    meta: Mapping[str, object],
    device: torch.device,
) -> Path:
    """Store the losses of a reference on samples `kept` as the artefact `out` (kind "reference-losses").

    What is compared (`objectives.base.compared`) is the trained divergence, or the one that judges. For each sample and
    unrolled step `[T]` float32, at the positions where the loss is taught, 0 elsewhere. Batches are
    planned before the first; an interrupted pass goes on with the next one.

    Args:
        reference: the objective that is trained, with the reference in the drafter's place.
        options: the training's: its precision, and the positions of a batch.
        meta: what identifies the reference and the samples.
    """
    lengths = dict(zip(source.ids, source.lengths, strict=True))
    taught = [name for name in kept if reference.teaches(source.outline(name))]
    identity = {**meta, "samples": len(taught), "precision": options.precision}
    batches = plan([lengths[name] for name in taught], options.batch_positions)
    started = time.perf_counter()
    with artefacts.writing(out, KIND, identity, resume=True, together=True) as scratch:
        shards = [(batch, scratch / f"shard-{number:05d}.safetensors") for number, batch in enumerate(batches)]
        own = ranks.share(shards)
        with console.progress("losses of the reference", sum(len(batch) for batch, _ in own), "samples") as bar:
            for batch, path in own:
                if not path.is_file():
                    samples = source.fetch([taught[i] for i in batch], 0)
                    artefacts.save_tensors(path, _losses(reference, samples, options, device))
                bar.advance(len(batch))
        if ranks.rank() == 0:
            index = (
                {"id": taught[i], "shard": number, "place": place}
                for number, batch in enumerate(batches)
                for place, i in enumerate(batch)
            )
            artefacts.write_jsonl(scratch / "index.jsonl", index)
            account = Account()
            account.add("reference", "judged", passes=len(batches), tokens=sum(lengths[name] for name in taught))
            artefacts.write_json(scratch / "cost.json", account.counts)
            artefacts.write_json(scratch / artefacts.MEASURED, {"seconds": round(time.perf_counter() - started, 3)})
    return out


def _losses(
    reference: Objective, samples: Sequence[StoredSample], options: TrainOptions, device: torch.device
) -> dict[str, Tensor]:
    """Columns `[T]` by "place of the sample in the batch, unrolled step"."""
    found: dict[str, Tensor] = {}
    with autocast(options.precision, device):
        for term in reference.losses(reference.collate([[sample] for sample in samples], device), DRAW):
            owners, places = term.facts.samples, term.facts.places
            assert owners is not None
            assert places is not None
            for number, sample in enumerate(samples):
                key = f"{number}.{term.step}"
                if key not in found:  # terms of one step are judged by the same
                    column = torch.zeros(len(sample.ids))
                    own = owners == number
                    column[places[own].cpu()] = compared(term)[own].float().cpu()
                    found[key] = column
    return found


class WithReference:
    """A source whose samples carry what `store_losses` stored of them."""

    def __init__(self, source: SampleSource, folder: Path, expect: Mapping[str, object] | None = None) -> None:
        artefacts.opened(folder, KIND, expect)
        self._source, self._folder = source, folder
        rows = artefacts.read_jsonl(folder / "index.jsonl")
        self._places = {str(row["id"]): (int(row["shard"]), int(row["place"])) for row in rows}
        self._shards: dict[int, dict[str, Tensor]] = {}

    @property
    def ids(self) -> Sequence[str]:
        return self._source.ids

    @property
    def lengths(self) -> Sequence[int]:
        return self._source.lengths

    def outline(self, name: str) -> StoredSample:
        return self._source.outline(name)

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        """The source's samples; those that the reference judged have its losses among their statistics."""
        return [self._with_losses(sample) for sample in self._source.fetch(ids, step)]

    def _with_losses(self, sample: StoredSample) -> StoredSample:
        if sample.id not in self._places:
            return sample
        shard, place = self._places[sample.id]
        if shard not in self._shards:
            self._shards[shard] = artefacts.load_tensors(self._folder / f"shard-{shard:05d}.safetensors")
        before = f"{place}."
        columns = {
            f"{REFERENCE}{key.removeprefix(before)}": column
            for key, column in self._shards[shard].items()
            if key.startswith(before)
        }
        return replace(sample, statistics={**sample.statistics, **columns})
