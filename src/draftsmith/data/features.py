"""One frozen target pass over samples: statistics of every token, hidden states of what is kept, in a store.

Texts are read in batches that are planned over all samples before the pass starts (by length, so that little is
padding), a shard a batch: an interrupted pass goes on with the next shard, and neither a kill nor the number of ranks
changes what is stored.

A position's row holds what the target knows *there*: its hidden states, and the statistics of its distribution over the
next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from draftsmith.data.samples import Sample
from draftsmith.data.watched import Watched
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.numerics.distributions import COLUMNS as STATISTICS
from draftsmith.numerics.distributions import statistics
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, Layer, TargetSpec

KIND = "features"


class PassOptions(Options):
    """How texts are read."""

    batch_positions: int = Field(default=4096, ge=1, description="positions of a batch at most, padding included")


@dataclass(frozen=True)
class StoredSample:
    """A sample of the store.

    Attributes:
        ids: `[T]` int64; mask: `[T]` bool, answer tokens.
        hidden: states by layer, `[T, H]` each (empty if only statistics were stored).
        statistics: by name, `[T]` (the last position's `nll` is of no token and 0).
    """

    id: str
    ids: Tensor
    mask: Tensor
    complete: bool
    hidden: Mapping[Layer, Tensor]
    statistics: Mapping[str, Tensor]

    @property
    def answer_rows(self) -> Tensor:
        """`[T]` bool: positions whose next token is an answer token; what scores are averaged over."""
        following = torch.zeros_like(self.mask)
        following[:-1] = self.mask[1:]
        return following


def plan(lengths: Sequence[int], batch_positions: int) -> list[list[int]]:
    """Batches of sample indices, longest first, each at most `batch_positions` with padding (at least one sample)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_positions:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def estimated_bytes(positions: int, want: FeatureSpec, hidden_size: int, item_bytes: int = 2) -> int:
    """Disk that a store of so many positions takes."""
    return positions * (len(want.names) * hidden_size * item_bytes + 4 * len(STATISTICS) + 9)


def store(
    target: HFTarget,
    samples: Sequence[Sample],
    want: FeatureSpec,
    options: PassOptions,
    out: Path,
    meta: Mapping[str, object],
    counted: Callable[[str], bool] = lambda _: True,
) -> Path:
    """Read all samples and store statistics and the wanted hidden states as the artefact `out` (kind "features").

    `want` may be empty: statistics only, about 30 bytes a token. Over the samples that are `counted` (by id) the store
    also sums up how often the target is expected to write each token (`FeatureStore.expected`).

    Raises:
        UserError: there are no samples.
    """
    identity = {**_identity(target.spec, samples, want, meta), "pass": options.model_dump(mode="json")}
    batches = plan([len(s.ids) for s in samples], options.batch_positions)
    with artefacts.writing(out, KIND, identity, resume=True, together=True) as scratch:
        shards = [(batch, scratch / f"shard-{number:05d}.safetensors") for number, batch in enumerate(batches)]
        own = [(batch, path, sum(len(samples[i].ids) for i in batch)) for batch, path in ranks.share(shards)]
        done = sum(n for _, path, n in own if path.is_file())
        with console.progress("reading with the target", sum(n for *_, n in own), "positions", done=done) as bar:
            for batch, path, n in own:
                if not path.is_file():
                    artefacts.save_tensors(path, read(target, [samples[i] for i in batch], want, counted))
                    bar.advance(n)
        index = []
        for number, batch in enumerate(batches):
            rows = placed([samples[i] for i in batch])
            index += [(i, {**row, "shard": number}) for i, row in zip(batch, rows, strict=True)]
        if ranks.rank() == 0:
            artefacts.write_jsonl(scratch / "index.jsonl", (row for _, row in sorted(index, key=lambda item: item[0])))
    return out


def store_watched(
    spec: TargetSpec, samples: Sequence[Sample], seen: Watched, out: Path, meta: Mapping[str, object]
) -> Path:
    """A store of statistics alone, out of what was seen while the target wrote (kind "features"): nothing is read.

    Rows that are about no answer token hold zeros.

    Raises:
        UserError: there are no samples.
    """
    with artefacts.writing(out, KIND, _identity(spec, samples, FeatureSpec(), meta)) as scratch:
        tensors = {
            "ids": torch.tensor([i for s in samples for i in s.ids], dtype=torch.int32),
            "mask": torch.tensor([m for s in samples for m in s.mask], dtype=torch.bool),
            "expected": seen.expected,
        }
        written = torch.cat([torch.tensor([*s.mask[1:], False]) for s in samples])
        for name in STATISTICS:
            known = torch.cat([seen.columns[s.id][name] for s in samples])
            tensors[name] = torch.zeros(len(written), dtype=known.dtype).masked_scatter(written, known)
        artefacts.save_tensors(scratch / "shard-00000.safetensors", tensors)
        artefacts.write_jsonl(scratch / "index.jsonl", ({**row, "shard": 0} for row in placed(samples)))
    return out


def _identity(
    spec: TargetSpec, samples: Sequence[Sample], want: FeatureSpec, meta: Mapping[str, object]
) -> dict[str, object]:
    if not samples:
        raise UserError("there is nothing to read: no conversation has an answer that fits the target's positions")
    return {
        **meta,
        "target": spec.fingerprint,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "layers": [str(name) for name in want.names],
        "dtype": spec.dtype,
        "samples": len(samples),
        "positions": sum(len(s.ids) for s in samples),
    }


def placed(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Where each sample stands in a shard that holds them one after another."""
    rows, start = [], 0
    for sample in samples:
        rows.append({"id": sample.id, "start": start, "length": len(sample.ids), "complete": sample.complete})
        start += len(sample.ids)
    return rows


def sample_at(row: Mapping[str, Any], shard: Mapping[str, Tensor]) -> StoredSample:
    """A sample out of a shard, by where it stands there."""
    span = slice(int(row["start"]), int(row["start"]) + int(row["length"]))
    hidden: dict[Layer, Tensor] = {}
    for name, tensor in shard.items():
        if name.startswith("hidden."):
            layer = name.removeprefix("hidden.")
            hidden["final" if layer == "final" else int(layer)] = tensor[span]
    return StoredSample(
        id=str(row["id"]),
        ids=shard["ids"][span].long(),
        mask=shard["mask"][span],
        complete=bool(row["complete"]),
        hidden=hidden,
        statistics={name: shard[name][span] for name in STATISTICS},
    )


def read(
    target: HFTarget, samples: Sequence[Sample], want: FeatureSpec, counted: Callable[[str], bool] | None = None
) -> dict[str, Tensor]:
    """A shard: what the target knows at every position of some samples, read together, one after another.

    Without `counted` nothing is summed up of the tokens that the target was expected to write.
    """
    lengths = [len(s.ids) for s in samples]
    ids = torch.zeros((len(samples), max(lengths)), dtype=torch.int64)
    for b, sample in enumerate(samples):
        ids[b, : lengths[b]] = torch.tensor(sample.ids)
    hidden = target.read(ids, lengths, want)
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    flat = valid.to(hidden["final"].device)
    tensors: dict[str, Tensor] = {}
    expected = None
    if counted is not None:
        answers = torch.zeros(ids.shape, dtype=torch.float32)
        for b, sample in enumerate(samples):
            if counted(sample.id):
                answers[b, : lengths[b] - 1] = torch.tensor(sample.mask[1:], dtype=torch.float32)
        expected = answers[valid].to(flat.device), torch.zeros(target.spec.vocab_size, device=flat.device)
    found = statistics(hidden["final"][flat], target.project, following[valid].to(flat.device), expected=expected)
    if expected is not None:
        tensors["expected"] = expected[1].cpu()
    tensors |= {name: column.cpu() for name, column in found.tensors().items()}
    last = torch.cumsum(torch.tensor(lengths), 0) - 1
    tensors["nll"][last] = 0.0
    tensors["ids"] = ids[valid].to(torch.int32)
    tensors["mask"] = torch.tensor([m for s in samples for m in s.mask], dtype=torch.bool)
    for name in want.names:
        tensors[f"hidden.{name}"] = hidden[name][flat].cpu()
    return tensors


class FeatureStore:
    """Random access to a store's samples; shards are memory-mapped and read on demand."""

    def __init__(self, folder: Path, expect: Mapping[str, object] | None = None, checksums: bool = True) -> None:
        self.folder = folder
        self.meta = artefacts.opened(folder, KIND, expect, checksums=checksums)
        self._index = list(artefacts.read_jsonl(folder / "index.jsonl"))
        self._place = {str(row["id"]): i for i, row in enumerate(self._index)}
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def ids(self) -> list[str]:
        """Sample ids in the order in which they were given."""
        return [str(row["id"]) for row in self._index]

    @property
    def lengths(self) -> list[int]:
        return [int(row["length"]) for row in self._index]

    def expected(self) -> Tensor:
        """`[V]` float64: how often the target is expected to write each token in the counted samples' answers, Σ p.

        A draft vocabulary chosen by it holds tokens that the answers could as well have held, not only those that a few
        answers happened to hold.
        """
        total = torch.zeros(int(self.meta["vocab_size"]), dtype=torch.float64)
        for number in sorted({int(row["shard"]) for row in self._index}):
            total += self._shard(number)["expected"]
        return total

    def __getitem__(self, item: int | str) -> StoredSample:
        row = self._index[self._place[item] if isinstance(item, str) else item]
        return sample_at(row, self._shard(int(row["shard"])))

    def outline(self, name: str) -> StoredSample:
        """A sample by id; what training looks at before it begins."""
        return self[name]

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        """Samples by id; they are the same at every step."""
        return [self[i] for i in ids]

    def __iter__(self) -> Iterator[StoredSample]:
        return (self[i] for i in range(len(self)))

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            self._shards[number] = artefacts.load_tensors(self.folder / f"shard-{number:05d}.safetensors")
        return self._shards[number]
