"""Training texts that the draft writes itself, read by the target (DistillSpec, 2310.08461: "on-policy", "mixed").

A draft learns from its own mistakes only on texts that hold them. Each prompt keeps the answer that the draft last
wrote to it (the replay buffer) until it is older than a number of optimiser steps; all answers of a step that are
missing or too old are written in one batch. Which prompts of a step get the draft's answer, and every token drawn, is
keyed by seed, step and prompt: a run that goes on from a saved buffer ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.data.features import PassOptions, StoredSample
from draftsmith.data.online import OnlineSource
from draftsmith.data.samples import Sample
from draftsmith.drafters.standalone import Standalone, StandaloneState
from draftsmith.foundation import ranks, seeding
from draftsmith.foundation.errors import UserError
from draftsmith.target import sampling
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, Rows, TargetOut, TargetSpec
from draftsmith.target.sampling import Sampling
from draftsmith.training.account import Account
from draftsmith.training.objectives.base import SampleSource
from draftsmith.training.options import OnPolicyOptions


@dataclass
class _Answer:
    """What the draft wrote to a prompt, and at which step."""

    token_ids: list[int]
    complete: bool
    step: int


class OnPolicySource:
    """A source of stored answers (`stored`) in whose place now and then stands what the draft writes.

    Args:
        stored: prompts and their stored answers; a prompt is what stands before a sample's last run of answer tokens.
        draft: the module under training: its weights at the time of a fetch write the answers.
        target: reads them.
        account: is told what writing and reading cost.

    Raises:
        UserError: several processes train: each would write answers of its own.
    """

    def __init__(
        self,
        stored: SampleSource,
        draft: Standalone,
        target: HFTarget,
        options: OnPolicyOptions,
        passes: PassOptions,
        seed: int,
        account: Account,
    ) -> None:
        if options.share and ranks.world() > 1:
            raise UserError(
                "on_policy.share: texts that the draft writes itself are for training in one process in this version; "
                "set it to 0, or train without torchrun"
            )
        self._stored, self._draft, self._target = stored, draft, target
        self._options, self._passes, self._seed, self._account = options, passes, seed, account
        self._places = {name: i for i, name in enumerate(stored.ids)}
        self._written: dict[str, _Answer] = {}

    @property
    def ids(self) -> Sequence[str]:
        return self._stored.ids

    @property
    def lengths(self) -> Sequence[int]:
        """At most so many positions: of the stored answer, or of one that the draft writes to its limit."""
        if not self._options.share:
            return self._stored.lengths
        own = (len(self._prompt(name)) + self._options.max_new_tokens for name in self.ids)
        return [max(pair) for pair in zip(self._stored.lengths, own, strict=True)]

    def outline(self, name: str) -> StoredSample:
        """The stored answer's ids and mask."""
        return self._stored.outline(name)

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        """The step's texts. The draft's own carry only the final states and the statistics of the target's reading."""
        own = [name for name in dict.fromkeys(ids) if self._is_own(name, step)]
        self._write([name for name in own if not self._fresh(name, step)], step)
        found = {sample.id: sample for sample in self._read(own)}
        rest = [name for name in dict.fromkeys(ids) if name not in found]
        found |= {sample.id: sample for sample in self._stored.fetch(rest, step)}
        return [found[name] for name in ids]

    def state(self) -> dict[str, Tensor]:
        """The buffer, to be saved with a checkpoint."""
        rows = [[self._places[name], a.step, int(a.complete), len(a.token_ids)] for name, a in self._written.items()]
        tokens = [token for a in self._written.values() for token in a.token_ids]
        return {
            "answers": torch.tensor(rows, dtype=torch.int64).reshape(-1, 4),
            "tokens": torch.tensor(tokens, dtype=torch.int64),
        }

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved buffer; an empty one where none was saved."""
        self._written = {}
        names, start = list(self.ids), 0
        rows = tensors["answers"].tolist() if "answers" in tensors else []
        for place, step, complete, length in rows:
            tokens = tensors["tokens"][start : start + length].tolist()
            self._written[names[place]] = _Answer(tokens, bool(complete), step)
            start += length

    def _is_own(self, name: str, step: int) -> bool:
        if self._options.share in (0.0, 1.0):
            return bool(self._options.share)
        drawn = seeding.uniform(torch.tensor(seeding.key("own answer", self._seed, name, step)), 1)
        return float(drawn) < self._options.share

    def _fresh(self, name: str, step: int) -> bool:
        known = self._written.get(name)
        return known is not None and step - known.step < self._options.replay_steps

    def _prompt(self, name: str) -> list[int]:
        sample = self._stored.outline(name)
        mask: list[bool] = sample.mask.tolist()
        end = len(mask)
        while end and not mask[end - 1]:
            end -= 1
        while end and mask[end - 1]:
            end -= 1
        return list(sample.ids[:end].tolist())

    def _write(self, names: Sequence[str], step: int) -> None:
        """Let the draft answer these prompts in one batch."""
        prompts = {name: prompt for name in names if (prompt := self._prompt(name))}
        if not prompts:
            return
        writer = _Writer(self._draft, self._target.spec)
        how = Sampling(temperature=self._options.temperature, seed=seeding.key("on-policy", self._seed, step) % 2**31)
        asked = list(prompts)
        events: Iterable[Any] = sampling.write(
            writer, [prompts[name] for name in asked], asked, how, self._options.max_new_tokens
        )
        for event in events:
            if isinstance(event, sampling.Written):
                self._written[asked[event.row]] = _Answer(event.token_ids, event.complete, step)
        self._account.add("draft", "written", passes=writer.passes, tokens=writer.tokens)

    def _read(self, names: Sequence[str]) -> list[StoredSample]:
        """The draft's answers as the target reads them; those to an empty prompt are left to the store."""
        samples = []
        for name in names:
            if name in self._written:
                prompt, answer = self._prompt(name), self._written[name]
                mask = [False] * len(prompt) + [True] * len(answer.token_ids)
                samples.append(Sample(name, [*prompt, *answer.token_ids], mask, answer.complete))
        if not samples:
            return []
        source = OnlineSource(self._target, samples, FeatureSpec(final=True), self._passes)
        self._account.add("target", "read", passes=1, tokens=sum(source.lengths))
        return source.fetch(source.ids, 0)


class _Writer:
    """A standalone draft as a target of plain decoding: it writes by itself, over the target's whole vocabulary."""

    def __init__(self, draft: Standalone, spec: TargetSpec) -> None:
        self._draft = draft
        self.spec = spec
        self.device = draft.device
        self.passes = self.tokens = 0
        self._state: StandaloneState | None = None

    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        self._state = self._draft.start(len(lengths), capacity)
        return TargetOut(self._read(ids, lengths)[:, 0], {})

    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        """Only roots: plain decoding."""
        return TargetOut(self._read(rows.tokens[:, :1], [1] * len(rows.tokens)), {})

    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        """What was read is committed already."""

    def select(self, sequences: Sequence[int]) -> None:
        assert self._state is not None
        index = torch.tensor(list(sequences), device=self.device)
        self._state.cache.select(sequences)
        self._state.root = self._state.root[index]
        self._state.positions, self._state.ancestors = self._state.positions[index], self._state.ancestors[index]

    def _read(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        assert self._state is not None
        self.passes += 1
        self.tokens += sum(lengths)
        log_q = self._draft.observe(self._state, tokens, None, lengths).log_q
        whole = torch.full((*log_q.shape[:2], self.spec.vocab_size), -torch.inf, device=log_q.device)
        whole[:, :, self._draft.vocab.target_ids.to(log_q.device)] = log_q
        return whole
