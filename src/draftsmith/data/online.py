"""Samples that the target reads as training goes on: nothing is stored, and what is computed is what a store holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.data.features import PassOptions, StoredSample, placed, plan, read, sample_at
from draftsmith.data.samples import Sample
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec


class OnlineSource:
    """Texts as a `FeatureStore` would hold them, read by the target whenever they are fetched.

    The same numbers as the store's up to rounding: a text is read beside others than in the pass over all of them.
    """

    def __init__(self, target: HFTarget, samples: Sequence[Sample], want: FeatureSpec, options: PassOptions) -> None:
        self._target, self._want, self._options = target, want, options
        self._samples = {sample.id: sample for sample in samples}

    @property
    def ids(self) -> list[str]:
        """Sample ids in the order in which they were given."""
        return list(self._samples)

    @property
    def lengths(self) -> list[int]:
        return [len(sample.ids) for sample in self._samples.values()]

    def outline(self, name: str) -> StoredSample:
        """A sample's ids and mask, without states."""
        sample = self._samples[name]
        return StoredSample(name, torch.tensor(sample.ids), torch.tensor(sample.mask), sample.complete, {}, {})

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        """Samples by id, read now, in batches of `batch_positions`."""
        distinct = list(dict.fromkeys(ids))
        samples = [self._samples[name] for name in distinct]
        found: dict[str, StoredSample] = {}
        for batch in plan([len(sample.ids) for sample in samples], self._options.batch_positions):
            together = [samples[i] for i in batch]
            shard = read(self._target, together, self._want)
            for row in placed(together):
                found[str(row["id"])] = sample_at(row, shard)
        return [found[name] for name in ids]
