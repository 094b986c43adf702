"""The n-gram drafter: proposes what followed the last tokens before, in the prompt or in the answer (prompt lookup).

It has no weights and asks nothing of the target. Each sequence keeps an index from n-grams to what followed them,
lengthened token by token; a look-up is one dictionary access for each length, whatever the context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field, model_validator
from torch import Tensor

from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation.options import Options
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

Gram = tuple[int, ...]


class NgramOptions(Options):
    """How far back the drafter matches, and how much it trusts a match."""

    n_max: int = Field(default=4, ge=1, description="longest suffix that is looked up")
    n_min: int = Field(default=1, ge=1, description="shortest suffix that is looked up")
    prior: float = Field(default=1.0, gt=0, description="a match of n tokens is trusted n / (n + prior)")
    guess: bool = Field(
        default=True,
        description="spread the mass that no match claims over the vocabulary; false: what never followed has "
        "probability 0, and growths draft nothing where nothing matches",
    )

    @model_validator(mode="after")
    def _ordered(self) -> NgramOptions:
        if self.n_min > self.n_max:
            raise ValueError(f"n_min ({self.n_min}) is larger than n_max ({self.n_max}): nothing would be looked up")
        return self


@dataclass
class Followers:
    """What followed one n-gram: how often each token, and which one last."""

    counts: dict[int, int] = field(default_factory=dict)
    total: int = 0
    latest: int = -1


@dataclass
class Known:
    """One sequence: its last `n_max` committed tokens, its index, and this round's nodes as the tokens before them."""

    tail: Gram = ()
    index: dict[Gram, Followers] = field(default_factory=dict)
    nodes: list[Gram] = field(default_factory=list)


@dataclass
class NgramState:
    sequences: list[Known]


class NgramDrafter:
    """Prompt lookup as a drafter like any other.

    The distribution after a context interpolates the matches of its suffixes, from `n_max` tokens down to `n_min`:

        P_n(x) = t_n · s_n(x) + (1 − t_n) · P_{n−1}(x),   t_n = n / (n + prior),
        s_n(x) = (times x followed the suffix of n tokens + [x followed it last]) / (times anything did + 1),

    lengths without a match are skipped, and below `n_min` the mass is uniform over the draft vocabulary. So a longer
    match outweighs a shorter one, of the same match the more frequent and then the more recent token stands first, and
    path probabilities are comparable with other drafters'. Mass of tokens outside the draft vocabulary joins the
    uniform rest.
    """

    def __init__(self, options: NgramOptions, vocab: VocabMap) -> None:
        self.options = options
        self._vocab = vocab
        self._draft_ids: list[int] = vocab.to_draft(torch.arange(vocab.vocab_size)).tolist()

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    def start(self, batch: int, capacity: int) -> NgramState:
        """A fresh state for `batch` sequences; `capacity` is not needed, indices grow as they must."""
        return NgramState([Known() for _ in range(batch)])

    def observe(self, state: NgramState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        """Index newly committed tokens `[B, L]` and propose what follows the last: `log_q [B, 1, Vd]` float32."""
        rows = tokens.tolist()
        for sequence, row, length in zip(state.sequences, rows, lengths, strict=True):
            self._read(sequence, row[:length])
            sequence.nodes.clear()
        return self._propose([(sequence, [sequence.tail]) for sequence in state.sequences], tokens.device)

    def expand(self, state: NgramState, frontier: Frontier) -> Proposal:
        """Look up nodes `[B, W]`, each behind its own ancestors: `log_q [B, W, Vd]` float32. Nothing is indexed."""
        asked: list[tuple[Known, list[Gram]]] = []
        rows = zip(state.sequences, frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)
        for sequence, tokens, parents in rows:
            above = [sequence.nodes[p] if p >= 0 else sequence.tail for p in parents]
            contexts = [self._cut((*context, token)) for context, token in zip(above, tokens, strict=True)]
            sequence.nodes += contexts
            asked.append((sequence, contexts))
        return self._propose(asked, frontier.tokens.device)

    def _cut(self, context: Gram) -> Gram:
        return context[-self.options.n_max :]

    def _read(self, sequence: Known, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in range(self.options.n_min, len(sequence.tail) + 1):
                followers = sequence.index.setdefault(sequence.tail[-n:], Followers())
                followers.counts[token] = followers.counts.get(token, 0) + 1
                followers.total += 1
                followers.latest = token
            sequence.tail = self._cut((*sequence.tail, token))

    def _claimed(self, sequence: Known, context: Gram) -> dict[int, float]:
        """Probability that matches give to each draft id that ever followed a suffix of the context."""
        claimed: dict[int, float] = {}
        left = 1.0
        for n in range(len(context), self.options.n_min - 1, -1):
            followers = sequence.index.get(context[-n:])
            if followers is None:
                continue
            trust = n / (n + self.options.prior)
            scale = left * trust / (followers.total + 1)
            for token, count in followers.counts.items():
                draft = self._draft_ids[token]
                if draft >= 0:
                    claimed[draft] = claimed.get(draft, 0.0) + scale * (count + (token == followers.latest))
            left *= 1 - trust
        return claimed

    def _propose(self, asked: Sequence[tuple[Known, Sequence[Gram]]], device: torch.device) -> Proposal:
        # One constant for each node and a few cells that differ: nothing is computed over the vocabulary.
        size = self._vocab.size
        floors: list[float] = []
        cells: list[int] = []
        values: list[float] = []
        for sequence, contexts in asked:
            for context in contexts:
                claimed = self._claimed(sequence, context)
                floor = max(1.0 - math.fsum(claimed.values()), 0.0) / size if self.options.guess else 0.0
                start = len(floors) * size
                cells += [start + draft for draft in claimed]
                values += [math.log(p + floor) for p in claimed.values()]
                floors.append(math.log(floor) if floor > 0 else -math.inf)
        log_q = torch.tensor(floors, dtype=torch.float32, device=device)[:, None].repeat(1, size)
        if cells:
            index = torch.tensor(cells, dtype=torch.int64, device=device)
            log_q.view(-1)[index] = torch.tensor(values, dtype=torch.float32, device=device)
        return Proposal(log_q.view(len(asked), -1, size))
