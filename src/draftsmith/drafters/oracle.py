"""A drafter that knows what will be written: it makes deep commits, refusals at every depth and ends inside the path
happen whatever a trained drafter can do, so that a check of losslessness checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

WRONG = 3  # other tokens that it finds likely at each place


@dataclass
class OracleState:
    """How far each sequence has come, whether it is still the known text, and of each node whether it is."""

    committed: list[int]
    known: list[bool]
    nodes: list[list[bool]] = field(default_factory=list)


class Oracle:
    """Proposes the next token of known texts: likeliest with probability `dial`, else somewhere behind or nowhere.

    Where it errs is keyed by sequence and position. Its draft vocabulary is the texts' own tokens.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int, dial: float = 0.7, seed: int = 0) -> None:
        self.texts = [list(text) for text in texts]
        self.dial = dial
        self.seed = seed
        self._vocab = VocabMap(torch.tensor(sorted({token for text in self.texts for token in text})), vocab_size)

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    def start(self, batch: int, capacity: int) -> OracleState:
        """A fresh state; sequence b writes `texts[b]`."""
        return OracleState([0] * batch, [True] * batch)

    def observe(self, state: OracleState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        """Compare committed tokens `[B, L]` with the texts: `log_q [B, 1, Vd]` float32."""
        for b, (row, n) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
            place = state.committed[b]
            state.known[b] = state.known[b] and row[:n] == self.texts[b][place : place + n]
            state.committed[b] += n
        state.nodes = [[] for _ in lengths]
        rows = [self._row(b, state.committed[b], known) for b, known in enumerate(state.known)]
        return Proposal(torch.stack(rows)[:, None].to(tokens.device))

    def expand(self, state: OracleState, frontier: Frontier) -> Proposal:
        """What follows nodes `[B, W]`, where they are the text's: `log_q [B, W, Vd]` float32."""
        rows: list[Tensor] = []
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            place = state.committed[b] + frontier.depth - 1
            above = list(state.nodes[b])
            for token, parent in zip(tokens, parents, strict=True):
                known = above[parent] if parent >= 0 else state.known[b]
                known = known and self.texts[b][place : place + 1] == [token]
                state.nodes[b].append(known)
                rows.append(self._row(b, place + 1, known))
        return Proposal(torch.stack(rows).unflatten(0, frontier.tokens.shape).to(frontier.tokens.device))

    def _row(self, b: int, place: int, known: bool) -> Tensor:
        size = self._vocab.size
        logits = torch.zeros(size)
        for rank in range(WRONG):
            logits[seeding.key("wrong", self.seed, b, place, rank) % size] = 4.0 - rank
        if known and place < len(self.texts[b]):
            token = int(self._vocab.to_draft(torch.tensor(self.texts[b][place])))
            draw = (seeding.key("dial", self.seed, b, place) % 10_000) / 10_000
            behind = 3.5 - seeding.key("rank", self.seed, b, place) % WRONG
            logits[token] = 6.0 if draw < self.dial else behind if draw < (1 + self.dial) / 2 else -6.0
        return logits.log_softmax(-1)
