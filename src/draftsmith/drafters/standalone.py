"""Standalone drafts: a small causal language model with the target's tokenizer, which reads tokens and nothing else.

Any transformers model of full or sliding-window attention will do. Its weights live in a plain transformers folder,
which `generate(assistant_model=…)`, vLLM and llama.cpp's converter take as it is. For drafting here the output
embedding may be cut to a draft vocabulary: on a small model it is the larger part of the work.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from draftsmith.drafters.base import Frontier, Proposal, with_children
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options, validate
from draftsmith.target import inside
from draftsmith.target.cache import KeyValueCache
from draftsmith.target.model import HFTarget, quiet_in_logs
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

FOLDER = "model"  # of the artefact: what other programs load
MAX_ROWS = 4096  # of a pass over a prompt: its mask has rows × rows cells


class StandaloneDraftOptions(Options):
    """What a saved standalone draft is, beside its transformers folder."""

    made_from: str = Field(description="the target, where its layers were kept, or the folder it was loaded from")
    kept_layers: tuple[int, ...] | None = Field(default=None, description="of the target; none: a model of its own")
    vocab_size: int = Field(description="the target's")
    draft_vocab_size: int = Field(description="tokens that it proposes here; elsewhere it proposes all")
    dtype: str = Field(default="float32", description="number format of its stored weights: the target's")


@dataclass
class StandaloneState:
    """A batch's draft cache: committed rows, then the provisional rows of this round's nodes.

    `positions [B, P]` and `ancestors [B, P, P]` belong to the provisional rows; `root [B, H]` is the final hidden state
    of the last committed token.
    """

    cache: KeyValueCache
    root: Tensor
    positions: Tensor
    ancestors: Tensor


class Standalone(nn.Module):
    """A transformers causal language model as a drafter, for decoding and for training.

    `vocab` maps its draft vocabulary to the target's.
    """

    KIND: ClassVar[str] = "standalone"
    LABEL: ClassVar[str] = "standalone draft"

    def __init__(self, o: StandaloneDraftOptions, vocab: VocabMap, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        self.options = o
        self.model = model
        self.tokenizer = tokenizer
        self._vocab = vocab
        self._config: Any = model.config.get_text_config()
        self._windows = inside.attention_windows(self._config, o.made_from)
        self._head: tuple[tuple[int, int], Tensor] | None = None

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec()

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def layers(self) -> int:
        """Decoder layers."""
        count: int = self._config.num_hidden_layers
        return count

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside its transformers folder: the draft vocabulary's maps."""
        return {"d2t": self.vocab.d2t, "t2d": self.vocab.t2d}

    def write_folder(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the transformers folder: configuration, weights in the stored format (`weights` instead of its own, by
        parameter name), the tokenizer where there is one.

        Its generation configuration asks assisted generation for chains of constant length.
        """
        model = copy.deepcopy(self).to(getattr(torch, self.options.dtype)).with_weights(weights).model
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0
        with quiet_in_logs():
            model.save_pretrained(folder)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: dict[str, Tensor], target: HFTarget, where: str) -> Self:
        """See `drafters.checkpoint.Saved`; the transformers folder stands beside the file `where`."""
        o = validate(StandaloneDraftOptions, options, where)
        model = load_model(Path(where).parent / FOLDER, o.vocab_size, getattr(torch, o.dtype))
        return cls(o, VocabMap.from_d2t(tensors["d2t"], o.vocab_size), model, target.tokenizer)

    @torch.no_grad()
    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """Itself, with other values in its parameters of these names."""
        own = dict(self.named_parameters())
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Buffers keep their number format, as when transformers loads a model: rounded rotary frequencies would turn
        # later positions by wrong angles.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != before[name].dtype:
                module, _, own = name.rpartition(".")
                self.get_submodule(module)._buffers[own] = before[name].to(buffer.device)
        return self

    def states(self, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states `[R, L, H]` (after the last norm) of packed texts, with gradient; see
        `target.inside.packed_masks`."""
        masks = inside.packed_masks(self._windows, segments, positions)
        return self._pass(ids, positions, masks, None)

    def output_rows(self) -> Tensor:
        """Rows `[Vd, H]` whose products with final hidden states are the logits of the draft vocabulary, with gradient.

        Raises:
            UserError: the model caps its logits or adds a bias to them.
        """
        ids = None if self.vocab.is_identity else self.vocab.target_ids
        return inside.output_rows(self.model, ids, self.options.made_from)

    def start(self, batch: int, capacity: int) -> StandaloneState:
        zeros = torch.zeros((batch, self._config.hidden_size), dtype=self.dtype, device=self.device)
        return StandaloneState(KeyValueCache(batch, capacity), zeros, *_no_nodes(batch, self.device))

    @torch.inference_mode()
    def observe(
        self, state: StandaloneState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]
    ) -> Proposal:
        cache = state.cache
        for start in range(0, tokens.shape[1], MAX_ROWS):
            chunk = tokens[:, start : start + MAX_ROWS].to(self.device)
            batch, width = chunk.shape
            counts = [min(max(n - start, 0), width) for n in lengths]
            rows = torch.arange(width, device=self.device)
            positions = torch.tensor(cache.lengths, device=self.device)[:, None] + rows
            visible = (rows[:, None] >= rows[None, :]).expand(batch, width, width)
            out = self._cached(cache, chunk, positions, visible)
            cache.keep(rows.expand(batch, width), counts)
            last = torch.tensor([max(n - 1, 0) for n in counts], device=self.device)
            fresh = out.gather(1, last[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]
            grew = torch.tensor([n > 0 for n in counts], device=self.device)
            state.root = torch.where(grew[:, None], fresh, state.root)
        state.positions, state.ancestors = _no_nodes(tokens.shape[0], self.device)
        return Proposal(self._log_q(state.root[:, None]))

    @torch.inference_mode()
    def expand(self, state: StandaloneState, frontier: Frontier) -> Proposal:
        width = frontier.tokens.shape[1]
        lengths = torch.tensor(state.cache.lengths, device=self.device)
        positions = (lengths + frontier.depth - 1)[:, None].expand(-1, width)
        state.positions = torch.cat([state.positions, positions], dim=1)
        state.ancestors = with_children(state.ancestors, frontier.parents)
        visible = state.ancestors[:, -width:]
        out = self._cached(state.cache, frontier.tokens.to(self.device), state.positions, visible)
        return Proposal(self._log_q(out))

    def _cached(self, cache: KeyValueCache, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Final hidden states `[B, R, H]` of a pass's rows; `positions [B, P]` are those of all provisional rows."""
        rows = tokens.shape[1]
        cache.expect(rows, self.device, held=positions.shape[1] - rows)
        lengths = torch.tensor(cache.lengths, device=self.device)
        masks = inside.cached_masks(self._windows, lengths, positions, visible, cache.span)
        return self._pass(tokens, positions[:, -rows:], masks, cache)

    def _pass(
        self, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor], cache: KeyValueCache | None
    ) -> Tensor:
        additive = self.dtype if self.model.config._attn_implementation == "eager" else None
        out = self.model.base_model(
            input_ids=tokens,
            attention_mask=inside.as_model_takes(masks, additive),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states: Tensor = out.last_hidden_state
        return states

    def _log_q(self, states: Tensor) -> Tensor:
        output = self.model.get_output_embeddings()
        if self.vocab.is_identity:
            logits = output(states)
        else:
            # the slice, made once and again when the weights have changed
            key = (output.weight.data_ptr(), output.weight._version)
            if self._head is None or self._head[0] != key:
                self._head = (key, output.weight.detach()[self.vocab.target_ids.to(self.device)].contiguous())
            bias = getattr(output, "bias", None)
            kept = None if bias is None else bias[self.vocab.target_ids.to(self.device)]
            logits = F.linear(states, self._head[1], kept)
        return F.log_softmax(inside.finished(self._config, logits).float(), dim=-1)


def _no_nodes(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and ancestors of a round without nodes yet."""
    return (
        torch.zeros((batch, 0), dtype=torch.int64, device=device),
        torch.zeros((batch, 0, 0), dtype=torch.bool, device=device),
    )


def load_model(folder: str | Path, vocab_size: int, dtype: torch.dtype) -> Any:
    """The causal language model of a folder (or hub id) as a draft for a target of `vocab_size` tokens.

    Raises:
        UserError: nothing loadable there, or another vocabulary.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_in_logs():
            model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(
            f"{folder}: not loadable as a causal language model: {str(problem).splitlines()[0]}"
        ) from problem
    found = model.get_output_embeddings().weight.shape[0]
    if found != vocab_size:
        raise UserError(
            f"{folder} writes {found:,} tokens where the target has {vocab_size:,}: a draft must have the target's "
            "tokenizer; take a smaller model of its family, or keep some of the target's layers"
        )
    return model
