"""A tiny random target that has a tokenizer and a chat template, and a drafter that knows texts by heart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from draftsmith.data.conversations import Conversation, Message
from draftsmith.decoding.engine import Engine
from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.target import chat
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import _config
from tests.unit.target.tokenizers_for_tests import CHATML, byte_tokenizer

VOCAB = 270


@cache
def talking_target(dtype: torch.dtype = torch.float32) -> HFTarget:
    """Always the same: a random Llama over bytes, which ends answers with `<|im_end|>`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    tokenizer = byte_tokenizer(CHATML)
    config = _config("llama", VOCAB)
    config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return HFTarget(model, tokenizer, "talking")


def conversation(name: str, text: str) -> Conversation:
    """A conversation that asks `text`."""
    return Conversation(name, (Message("user", text),), "made")


def answers(
    target: HFTarget, asked: Sequence[Conversation], new: int, temperatures: Sequence[float] = (0.0,), seed: int = 0
) -> list[list[int]]:
    """Prompt and plain answer to each conversation, at each temperature, drawn as `bench` draws them."""
    texts = []
    for temperature in temperatures:
        for one in asked:
            ids = chat.prompt_ids(target.tokenizer, one.messages)
            sampling = Sampling(temperature=temperature, seed=seed)
            texts.append([*ids, *Engine(target).generate([ids], sampling, new, [one.id])[0].token_ids])
    return texts


@dataclass
class _State:
    ids: list[list[int]]
    paths: list[list[list[int]]] = field(default_factory=list)


class Memory:
    """Proposes what follows in a text that begins like the sequence; errs after every `errs`-th token (0: never)."""

    def __init__(self, texts: Sequence[Sequence[int]], errs: int = 5, vocab: int = VOCAB) -> None:
        self.texts = [list(t) for t in texts]
        self.errs = errs
        self.vocab = VocabMap.identity(vocab)
        self.wants = FeatureSpec()

    def start(self, batch: int, capacity: int) -> _State:
        return _State([[] for _ in range(batch)])

    def observe(self, state: _State, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        for ids, row, n in zip(state.ids, tokens.tolist(), lengths, strict=True):
            ids += row[:n]
        state.paths = [[] for _ in lengths]
        return Proposal(torch.stack([self._row(ids) for ids in state.ids])[:, None])

    def expand(self, state: _State, frontier: Frontier) -> Proposal:
        rows = []
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            known = list(state.paths[b])
            paths = [[*(known[p] if p >= 0 else []), t] for t, p in zip(tokens, parents, strict=True)]
            state.paths[b] += paths
            rows.append(torch.stack([self._row([*state.ids[b], *path]) for path in paths]))
        return Proposal(torch.stack(rows))

    def _row(self, context: list[int]) -> Tensor:
        logits = torch.zeros(self.vocab.size)
        logits[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1])  # something to fill a tree with
        size = len(context)
        follows = next((t[size] for t in self.texts if len(t) > size and t[:size] == context), None)
        if follows is not None:
            wrong = self.errs and size % self.errs == 0
            logits[(follows + 1) % self.vocab.size if wrong else follows] = 6.0
        return logits.log_softmax(-1)
