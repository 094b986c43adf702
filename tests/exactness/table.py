"""A target and a drafter whose distributions are tables over contexts, in float64: with these the law of the rules for
sampled candidates is enumerated and counted. The engine between them is the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.target.protocol import FeatureSpec, Rows, TargetOut, TargetSpec
from draftsmith.target.vocabulary import VocabMap

Ids = tuple[int, ...]


@cache
def logits(what: str, context: Ids, vocab: int) -> Tensor:
    """`[V]` float64, the table's entry: random, and the same for equal arguments."""
    generator = torch.Generator().manual_seed(seeding.key(what, *context))
    return torch.randn(vocab, generator=generator, dtype=torch.float64) * 1.3


class TableTarget:
    """Logits after a context come from the table; there is nothing to compute and nothing to cache."""

    device = torch.device("cpu")

    def __init__(self, vocab: int, ends: Ids = ()) -> None:
        self.spec = TargetSpec("table", "table", vocab, 1, 1, 512, ends, "float64")
        self._texts: list[Ids] = []
        self._rows: list[list[Ids]] = []

    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        self._texts = [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]
        return TargetOut(torch.stack([logits("p", text, self.spec.vocab_size) for text in self._texts]), {})

    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        self._rows = [
            [(*text, *(token for token, seen in zip(own, row, strict=True) if seen)) for row in visible]
            for text, own, visible in zip(self._texts, rows.tokens.tolist(), rows.visible.tolist(), strict=True)
        ]
        found = [torch.stack([logits("p", text, self.spec.vocab_size) for text in row]) for row in self._rows]
        return TargetOut(torch.stack(found), {})

    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        kept = zip(self._texts, self._rows, rows.tolist(), counts, strict=True)
        self._texts = [contexts[own[n - 1]] if n else text for text, contexts, own, n in kept]

    def select(self, sequences: Sequence[int]) -> None:
        self._texts = [self._texts[b] for b in sequences]


@dataclass
class TableState:
    texts: list[Ids]
    nodes: list[list[Ids]] = field(default_factory=list)


class TableDrafter:
    """Its logits are halfway between the target's and another table's, over its own vocabulary."""

    def __init__(self, vocab: VocabMap) -> None:
        self._vocab = vocab

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    def start(self, batch: int, capacity: int) -> TableState:
        return TableState([()] * batch)

    def observe(self, state: TableState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        read = zip(state.texts, tokens.tolist(), lengths, strict=True)
        state.texts = [(*text, *row[:n]) for text, row, n in read]
        state.nodes = [[] for _ in lengths]
        return Proposal(torch.stack([self.law(text)[None] for text in state.texts]))

    def expand(self, state: TableState, frontier: Frontier) -> Proposal:
        found = []
        asked = zip(state.texts, state.nodes, frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)
        for text, nodes, tokens, parents in asked:
            known = list(nodes)
            fresh = [(*(known[p] if p >= 0 else text), token) for token, p in zip(tokens, parents, strict=True)]
            nodes += fresh
            found.append(torch.stack([self.law(own) for own in fresh]))
        return Proposal(torch.stack(found))

    def law(self, context: Ids) -> Tensor:
        """`[Vd]` float32 log probabilities."""
        wide = (logits("p", context, self._vocab.vocab_size) + logits("q", context, self._vocab.vocab_size)) / 2
        return wide[self._vocab.target_ids].log_softmax(-1).float()
