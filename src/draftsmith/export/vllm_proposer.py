"""draftsmith's n-gram drafter inside vLLM: a proposer of its method `custom_class`, which is given tokens only.

    vllm serve TARGET --speculative-config '{"method": "custom_class", "num_speculative_tokens": 3,
      "model": "draftsmith.export.vllm_proposer.NgramProposer"}'

Written for vLLM 0.32.0 (v1/spec_decode/custom_class_proposer.py); draftsmith is to be installed beside vLLM
(`pip install --no-deps draftsmith`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.drafters.base import Frontier
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions, NgramState
from draftsmith.target.vocabulary import VocabMap


class NgramProposer:
    """Chains of what followed the last tokens before; fewer tokens, or none, where nothing did.

    Args:
        vllm_config: vLLM's own, of which the vocabulary's size and the number of speculative tokens are read.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        vocab = VocabMap.identity(int(vllm_config.model_config.get_vocab_size()))
        self.drafter = NgramDrafter(NgramOptions(guess=False), vocab)
        self._read: dict[int, tuple[list[int], NgramState]] = {}

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM asks every proposer to; there are no weights."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Drafted tokens of each request of the batch.

        Args:
            sampled_token_ids: what each has just committed; nothing while its prompt is being read.
            num_tokens_no_spec: `[B]`, tokens of each, prompt and answer, the new ones included.
            token_ids_cpu: `[B, longest]`, those tokens.
        """
        return [
            self.chain(row, token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()) if len(sampled) else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def chain(self, row: int, ids: list[int]) -> list[int]:
        """The chain after `ids`. A row goes on where its tokens begin with those that it held; else it is another
        request's now, and is read anew."""
        known, state = self._read.get(row, ([], None))
        if state is None or ids[: len(known)] != known or len(ids) == len(known):
            known, state = [], self.drafter.start(1, len(ids))
        self._read[row] = (ids, state)
        new = ids[len(known) :]
        log_q = self.drafter.observe(state, torch.tensor([new]), None, [len(new)]).log_q
        drafted: list[int] = []
        while len(drafted) < self.tokens and float(log_q.max()) > -math.inf:
            token = log_q.argmax().reshape(1, 1)
            drafted.append(int(token))
            frontier = Frontier(token, torch.tensor([[len(drafted) - 2]]), len(drafted))
            log_q = self.drafter.expand(state, frontier).log_q
        return drafted
