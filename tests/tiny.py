"""Tiny random targets and an oracle drafter: what the tests decode with. Seconds on a CPU, no network, nothing on disk.

Random drafters propose what a random target almost never writes, so nothing deep would ever be exercised. The oracle
knows what the target writes (decoded plainly before) and proposes it with a probability that a test sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from draftsmith.drafters.base import Frontier, Proposal
from draftsmith.drafters.eagle import Eagle, eagle_options
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.drafters.standalone import Standalone
from draftsmith.drafters.truncation import StandaloneOptions, made
from draftsmith.foundation import seeding
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

VOCAB = 96
END = 7
LAYERS = 8
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "mixtral")


class NoTokenizer:
    """Stands where a tokenizer would: tests decode ids."""

    eos_token_id = END


def _config(kind: str, vocab: int) -> Any:
    import transformers as t

    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": END,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.25,
    }
    match kind:
        case "llama":
            return t.LlamaConfig(**common)
        case "qwen2":
            return t.Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"})
        case "qwen3":
            return t.Qwen3Config(**common)
        case "mistral":
            return t.MistralConfig(**common, sliding_window=6)
        case "gemma3":
            return t.Gemma3TextConfig(**common, sliding_window=6, query_pre_attn_scalar=8)
        case "mixtral":
            return t.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    raise AssertionError(kind)


@cache
def tiny_target(kind: str = "llama", vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> HFTarget:
    """A random target of a family, always the same one; logits spread enough that near ties are rare."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seeding.key("tiny", kind, vocab) % 2**31)
    model = AutoModelForCausalLM.from_config(_config(kind, vocab)).to(dtype)
    model.generation_config.eos_token_id = END
    return HFTarget(model, NoTokenizer(), f"tiny-{kind}")


def tiny_head(kind: str = "llama", vocab: VocabMap | None = None, seed: int = 0, **changed: Any) -> Eagle3:
    """A random EAGLE-3 head for a tiny target, in float32; `changed` options replace the target's own."""
    target = tiny_target(kind)
    vocab = vocab or VocabMap.identity(VOCAB)
    options = eagle3_options(target.model.config, target.spec, vocab.size)
    torch.manual_seed(seed)
    changed = {"initializer_range": 0.2, **changed}
    return Eagle3(options.model_copy(update=changed), vocab, target.embedding).eval()


def tiny_eagle(kind: str = "llama", vocab: VocabMap | None = None, seed: int = 0, **changed: Any) -> Eagle:
    """A random EAGLE head for a tiny target, in float32; `changed` options replace the target's own."""
    target = tiny_target(kind)
    vocab = vocab or VocabMap.identity(VOCAB)
    options = eagle_options(target.model.config, target.spec, vocab.size)
    torch.manual_seed(seed)
    changed = {"initializer_range": 0.1, **changed}
    return Eagle.for_target(options.model_copy(update=changed), vocab, target).eval()


def tiny_draft(kind: str, keep: int, vocab: VocabMap | None = None) -> Standalone:
    """A standalone draft of a tiny target's first layers, in float32: these random targets need their first most, so
    that it is right now and then without training."""
    options = StandaloneOptions(keep_layers=tuple(range(keep)), train_embedding=True)
    return made(tiny_target(kind), vocab or VocabMap.identity(VOCAB), options, [])


def prompts(count: int, vocab: int = VOCAB, seed: int = 0, low: int = 3, high: int = 14) -> list[list[int]]:
    """Random prompts of different lengths without end tokens."""
    made = []
    for i in range(count):
        length = low + seeding.key("length", seed, i) % (high - low + 1)
        ids = [8 + seeding.key("prompt", seed, i, j) % (vocab - 8) for j in range(length)]
        made.append(ids)
    return made


@dataclass
class OracleState:
    committed: list[int]
    nodes: list[list[tuple[int, bool]]] = field(default_factory=list)


class OracleDrafter:
    """Knows each sequence's text; at every depth it ranks the right token first with probability `dial`, else somewhere
    in its top four or nowhere, keyed by position, so that a run is reproducible."""

    def __init__(
        self, texts: Sequence[Sequence[int]], dial: float, vocab: VocabMap | None = None, seed: int = 0
    ) -> None:
        self.texts = [list(t) for t in texts]
        self.dial = dial
        self.seed = seed
        self._vocab = vocab or VocabMap.identity(VOCAB)

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    def start(self, batch: int, capacity: int) -> OracleState:
        return OracleState([0] * batch)

    def observe(self, state: OracleState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        for b, n in enumerate(lengths):
            got = tokens[b, :n].tolist()
            assert got == self.texts[b][state.committed[b] : state.committed[b] + n], (
                "committed tokens are not the plain ones"
            )
            state.committed[b] += n
        state.nodes = [[] for _ in lengths]
        return Proposal(torch.stack([self._row(b, state.committed[b], True) for b in range(len(lengths))])[:, None])

    def expand(self, state: OracleState, frontier: Frontier) -> Proposal:
        rows = []
        for b, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            known = list(state.nodes[b])
            for token, parent in zip(tokens, parents, strict=True):
                place = state.committed[b] + frontier.depth - 1
                right = parent < 0 or known[parent][1]
                right = right and place < len(self.texts[b]) and self.texts[b][place] == token
                state.nodes[b].append((token, right))
                rows.append(self._row(b, place + 1, right))
        return Proposal(torch.stack(rows).unflatten(0, frontier.tokens.shape))

    def _row(self, b: int, place: int, on_path: bool) -> Tensor:
        size = self._vocab.size
        logits = torch.zeros(size)
        for rank in range(4):
            logits[seeding.key("wrong", self.seed, b, place, rank) % size] = 3.0 - rank
        if on_path and place < len(self.texts[b]):
            token = int(self._vocab.to_draft(torch.tensor(self.texts[b][place])))
            draw = (seeding.key("dial", self.seed, b, place) % 10_000) / 10_000
            if token >= 0:
                if draw < self.dial:
                    logits[token] = 5.0
                elif draw < self.dial + (1 - self.dial) / 2:
                    logits[token] = 2.5 - seeding.key("rank", self.seed, b, place) % 3
                else:
                    logits[token] = -5.0
        return logits.log_softmax(-1)
