"""AdaSPEC's reference (2510.19779, §3): a drafter of the same shape, trained plainly, whose losses show which tokens a
drafter of that size can learn. Its losses are computed once, stored, and come back with the samples.

What is stored of a token is what token weights compare: the trained divergence, or the one that judges (`judged`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.data.features import StoredSample, plan
from draftsmith.foundation import artefacts, console
from draftsmith.training.account import Account
from draftsmith.training.batches import REFERENCE
from draftsmith.training.objectives.base import Objective, SampleSource, StepLosses
from draftsmith.training.options import TrainOptions, autocast

KIND = "reference-losses"


def compared(term: StepLosses) -> Tensor:
    """`[N]`: the loss of a term that token weights compare with another drafter's."""
    return term.values if term.facts.judged is None else term.facts.judged


@torch.no_grad()
def store_losses(
    reference: Objective,
    source: SampleSource,
    kept: Sequence[str],
    options: TrainOptions,
    out: Path,
    meta: Mapping[str, object],
    device: torch.device,
    account: Account,
) -> Path:
    """Store the losses of a reference on samples `kept` as the artefact `out` (kind "reference-losses").

    For each sample and unrolled step `[T]` float32, at the positions where the loss is taught, 0 elsewhere. Batches are
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
    with artefacts.writing(out, KIND, identity, resume=True) as scratch:
        index = []
        with console.progress("losses of the reference", len(taught), "samples") as bar:
            for number, batch in enumerate(batches):
                names = [taught[i] for i in batch]
                path = scratch / f"shard-{number:05d}.safetensors"
                if not path.is_file():
                    samples = source.fetch(names, 0)
                    artefacts.save_tensors(path, _losses(reference, samples, options, device))
                    account.add("reference", "judged", passes=1, tokens=sum(len(s.ids) for s in samples))
                index += [{"id": name, "shard": number, "place": place} for place, name in enumerate(names)]
                bar.advance(len(names))
        artefacts.write_jsonl(scratch / "index.jsonl", index)
    return out


def _losses(
    reference: Objective, samples: Sequence[StoredSample], options: TrainOptions, device: torch.device
) -> dict[str, Tensor]:
    """Columns `[T]` by "place of the sample in the batch, unrolled step"."""
    found: dict[str, Tensor] = {}
    with autocast(options.precision, device):
        for term in reference.losses(reference.collate([[sample] for sample in samples], device), ("reference",)):
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
