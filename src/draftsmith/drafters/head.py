"""What all EAGLE-like heads share: the options that shape them, one decoder layer over embedding ‖ hidden state, its
key/value cache with provisional rows, and decoding (`observe`, `expand`) in terms of that layer.

A head's row p reads the target's state at position p and the embedding of token p+1, and predicts token p+2. In
decoding the engine hands over pairs (token, the state that produced it), so a row is simply such a pair; its rotary
position is its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from draftsmith.drafters import unrolled
from draftsmith.drafters.base import Frontier, Proposal, with_children
from draftsmith.drafters.unrolled import StepOut, UnrollBatch
from draftsmith.foundation.options import Options, validate
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.vocabulary import VocabMap


class HeadOptions(Options):
    """Shape of a head; names follow transformers' configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int
    vocab_size: int
    draft_vocab_size: int
    hidden_act: str = "silu"
    attention_bias: bool = False
    initializer_range: float = Field(default=0.02, gt=0)


def sizes(config: Any, spec: TargetSpec, draft_vocab_size: int) -> dict[str, Any]:
    """`HeadOptions` of a head of the target's own width, for a target's (text) configuration."""
    theta, scaling = rotary_parameters(config)
    heads = config.num_attention_heads
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "draft_vocab_size": draft_vocab_size,
    }


def rotary_parameters(config: Any) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of a target's configuration; scaling is None for plain rotary embeddings."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if parameters and all(isinstance(v, dict) for v in parameters.values()):
        # One set per layer type (Gemma): a head attends to everything, like the full-attention layers.
        parameters = dict(parameters.get("full_attention") or next(iter(parameters.values())))
    theta = float(parameters.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0)
    return theta, parameters if parameters.get("rope_type", "default") != "default" else None


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


@torch.no_grad()
def norm_scale(norm: nn.Module, size: int) -> Tensor:
    """What a target's norm multiplies `[H]` normed states with, float32: asked of the norm itself, for some models
    store it less one (Gemma) or scale it further."""
    # Large, so that the epsilon is lost in it, a power of two, so that nothing is rounded, and of mean 0.
    device = next(norm.parameters()).device
    probe = 1024.0 * (1 - 2 * (torch.arange(size, device=device) % 2)).float()
    scale: Tensor = (norm(probe) - norm(-probe)).float() / 2 * probe.sign()
    return scale


class Attention(nn.Module):
    def __init__(self, o: HeadOptions, inputs: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, o.num_attention_heads * o.head_dim, bias=o.attention_bias)
        self.k_proj = nn.Linear(inputs, o.num_key_value_heads * o.head_dim, bias=o.attention_bias)
        self.v_proj = nn.Linear(inputs, o.num_key_value_heads * o.head_dim, bias=o.attention_bias)
        self.o_proj = nn.Linear(o.num_attention_heads * o.head_dim, o.hidden_size, bias=o.attention_bias)
        self.head_dim = o.head_dim

    def heads(self, x: Tensor) -> Tensor:
        """`[B, T, heads·d]` → `[B, heads, T, d]`."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}


class MLP(nn.Module):
    def __init__(self, o: HeadOptions) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(o.hidden_size, o.intermediate_size, bias=False)
        self.up_proj = nn.Linear(o.hidden_size, o.intermediate_size, bias=False)
        self.down_proj = nn.Linear(o.intermediate_size, o.hidden_size, bias=False)
        self.act = _ACTIVATIONS[o.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class Rotary:
    """Rotary tables `[positions, head_dim]`, float32, made once and lengthened when a longer context comes."""

    def __init__(self, o: HeadOptions) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        scaling = o.rope_scaling or {"rope_type": "default"}
        config = LlamaConfig(
            hidden_size=o.hidden_size,
            num_attention_heads=o.num_attention_heads,
            head_dim=o.head_dim,
            max_position_embeddings=o.max_position_embeddings,
            rope_parameters={**scaling, "rope_theta": o.rope_theta},
        )
        self._make = LlamaRotaryEmbedding(config)
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._cos = self._sin = torch.zeros(0, o.head_dim)

    def reach(self, positions: int, device: torch.device) -> None:
        if self._cos.shape[0] < positions or self._cos.device != device:
            size = max(positions, 2 * self._cos.shape[0], 512)
            index = torch.arange(size, device=device)[None]
            cos, sin = self._make.to(device)(torch.zeros(1, dtype=torch.float32, device=device), index)
            half = sin.shape[-1] // 2
            # the first half of the sines changes its sign here, not the values that are turned
            self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
            self._tables = {}

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x [B, heads, T, d]` to `positions [B, T]`."""
        if x.dtype not in self._tables:
            self._tables[x.dtype] = (self._cos.to(x.dtype), self._sin.to(x.dtype))
        cos, sin = self._tables[x.dtype]
        half = x.shape[-1] // 2
        swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
        return x * cos[positions][:, None] + swapped * sin[positions][:, None]


@dataclass
class HeadState:
    """A batch's draft cache: committed rows, then the provisional rows of this round's nodes.

    `hidden [B, P, H]` and `ancestors [B, P, P]` belong to the provisional rows, `root [B, H]` to the last committed.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]
    root: Tensor
    hidden: Tensor
    ancestors: Tensor

    @property
    def started(self) -> bool:
        return max(self.lengths) > 0


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Head(nn.Module):
    """Decoding of a head with one decoder layer; subclasses say what the layer reads and what is passed on."""

    KIND: ClassVar[str]
    LABEL: ClassVar[str]
    OPTIONS: ClassVar[type[HeadOptions]]

    def __init__(self, o: HeadOptions, vocab: VocabMap, embedding: Tensor) -> None:
        super().__init__()
        self.options = o
        self._vocab = vocab
        # The target's, shared and frozen: kept out of the module's parameters and of its checkpoints.
        self._embedding = (embedding,)
        self.rotary = Rotary(o)

    @classmethod
    def for_target(cls, o: HeadOptions, vocab: VocabMap, target: HFTarget) -> Self:
        """An untrained head with what it shares with its target."""
        return cls(o, vocab, target.embedding)

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: dict[str, Tensor], target: HFTarget, where: str) -> Self:
        """See `drafters.checkpoint.Saved`."""
        o = validate(cls.OPTIONS, options, where)
        own = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
        head = cls.for_target(o, VocabMap.from_d2t(tensors["d2t"], o.vocab_size), target)
        head.load_state_dict(own)
        return head

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: the weights, and the draft vocabulary's maps."""
        return {**self.state_dict(), "d2t": self.vocab.d2t, "t2d": self.vocab.t2d}

    @property
    def vocab(self) -> VocabMap:
        return self._vocab

    @property
    def embedding(self) -> Tensor:
        return self._embedding[0]

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        # asked several times a pass: to walk through all parameters for the first takes longer than some operations
        weight: Tensor = self.decoder.post_attention_layernorm.weight
        return weight

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding of token ids, in the head's number format."""
        return F.embedding(tokens.to(self.embedding.device), self.embedding).to(self.device, self.dtype)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features `[B, T, F]` → the state the layer reads `[B, T, H]`."""
        raise NotImplementedError

    @property
    def decoder(self) -> Any:
        """The decoder layer: a module with `self_attn`, `mlp` and `post_attention_layernorm`."""
        raise NotImplementedError

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of rows (embedding, state), and the residual `[B, T, H]` that it is added to."""
        raise NotImplementedError

    def passed_on(self, states: Tensor) -> Tensor:
        """What the next step reads as its state."""
        return states

    def judged(self, states: Tensor) -> Tensor:
        """What the output embedding is multiplied with."""
        return states

    @property
    def output(self) -> Tensor:
        """The output embedding `[Vd, H]`: the head's own, or rows of the target's."""
        raise NotImplementedError

    def log_q(self, states: Tensor) -> Tensor:
        """Log probabilities over the draft vocabulary, float32 `[B, T, Vd]`."""
        return F.log_softmax(F.linear(self.judged(states), self.output.to(states.dtype)).float(), dim=-1)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries `[B, heads, T, d]` of what attention reads, turned to their positions `[B, T]`."""
        attention = self.decoder.self_attn
        return self.rotary.turn(attention.heads(attention.q_proj(x)), positions)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, key heads, T, d]`, the keys turned to their positions."""
        attention = self.decoder.self_attn
        return self.rotary.turn(attention.heads(attention.k_proj(x)), positions), attention.heads(attention.v_proj(x))

    def rest(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The layer from attention's result `[B, heads, T, d]` on: states `[B, T, H]`."""
        decoder = self.decoder
        states = residual + decoder.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = states + decoder.mlp(decoder.post_attention_layernorm(states))
        return out

    def layer(self, embeds: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One decoder layer over rows (embedding, state) → states `[B, T, H]`."""
        x, residual = self.inputs(embeds, hidden)
        attention = self.decoder.self_attn
        # queries and keys are turned at once: in decoding the number of operations is what costs
        both = torch.cat([attention.heads(attention.q_proj(x)), attention.heads(attention.k_proj(x))], dim=1)
        turned = self.rotary.turn(both, positions)
        heads = self.options.num_attention_heads
        return self.rest(residual, attend(turned[:, :heads], turned[:, heads:], attention.heads(attention.v_proj(x))))

    def unroll(
        self, batch: UnrollBatch, steps: int, detach_steps: bool = False, checkpoint_steps: bool = False
    ) -> Iterator[StepOut]:
        """Training rows, drafted as in decoding: `unrolled.unroll`."""
        return unrolled.unroll(self, batch, steps, detach_steps, checkpoint_steps)

    def start(self, batch: int, capacity: int) -> HeadState:
        o = self.options
        shape = (batch, o.num_key_value_heads, capacity, o.head_dim)
        zeros = torch.zeros(shape, dtype=self.dtype, device=self.device)
        state = torch.zeros((batch, o.hidden_size), dtype=self.dtype, device=self.device)
        nothing = torch.zeros((batch, 0, 0), dtype=torch.bool, device=self.device)
        return HeadState(zeros, zeros.clone(), [0] * batch, state, state[:, None][:, :0], nothing)

    @torch.inference_mode()
    def observe(self, state: HeadState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        assert features is not None
        if not state.started:
            # A sequence's first token has no state before it.
            tokens, features, lengths = tokens[:, 1:], features[:, 1:], [n - 1 for n in lengths]
        tokens, features = tokens.to(self.device), features.to(self.device, self.dtype)
        batch, width = tokens.shape
        before = torch.tensor(state.lengths, device=self.device)
        rows = torch.arange(width, device=self.device)
        visible = (rows[:, None] >= rows[None, :]).expand(batch, width, width)
        positions = before[:, None] + rows
        out = self.layer(self.embed(tokens), self.fuse(features), positions, self._attend(state, 0, visible))
        if min(lengths) == max(lengths) > 0:
            state.root = out[:, lengths[0] - 1]
        else:
            last = torch.tensor([max(n - 1, 0) for n in lengths], device=self.device)
            fresh = out.gather(1, last[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]
            grew = torch.tensor([n > 0 for n in lengths], device=self.device)
            state.root = torch.where(grew[:, None], fresh, state.root)
        state.lengths = [a + n for a, n in zip(state.lengths, lengths, strict=True)]
        state.hidden = out[:, :0]
        state.ancestors = torch.zeros((batch, 0, 0), dtype=torch.bool, device=self.device)
        return Proposal(self.log_q(state.root[:, None]))

    @torch.inference_mode()
    def expand(self, state: HeadState, frontier: Frontier) -> Proposal:
        width, old = frontier.tokens.shape[1], state.hidden.shape[1]
        everyone = torch.cat([state.root[:, None], state.hidden], dim=1)
        hidden = everyone.gather(1, (frontier.parents + 1)[:, :, None].expand(-1, -1, everyone.shape[2]))
        state.ancestors = with_children(state.ancestors, frontier.parents)
        before = torch.tensor(state.lengths, device=self.device)
        positions = (before + frontier.depth - 1)[:, None].expand(-1, width)
        attend = self._attend(state, old, state.ancestors[:, old:])
        out = self.layer(self.embed(frontier.tokens), self.passed_on(hidden), positions, attend)
        state.hidden = torch.cat([state.hidden, out], dim=1)
        return Proposal(self.log_q(out))

    def _attend(self, state: HeadState, offset: int, visible: Tensor) -> Attend:
        """Attention of a pass over all committed rows and the `visible [B, W, offset + W]` ones of this round."""
        lengths = state.lengths
        width = visible.shape[1]
        span = max(lengths) + offset + width
        if span > state.keys.shape[2]:
            extra = max(span, 2 * state.keys.shape[2]) - state.keys.shape[2]
            state.keys = F.pad(state.keys, (0, 0, 0, extra))
            state.values = F.pad(state.values, (0, 0, 0, extra))
        self.rotary.reach(span + 1, self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(set(lengths)) == 1:
                at = lengths[0] + offset
                state.keys[:, :, at : at + width] = k
                state.values[:, :, at : at + width] = v
                mask = F.pad(visible, (lengths[0], 0), value=True)
            else:
                start = torch.tensor(lengths, device=self.device)
                own = start[:, None] + torch.arange(offset + width, device=self.device)
                sequence = torch.arange(len(lengths), device=self.device)[:, None]
                state.keys[sequence, :, own[:, offset:]] = k.transpose(1, 2)
                state.values[sequence, :, own[:, offset:]] = v.transpose(1, 2)
                slots = torch.arange(span, device=self.device)
                mask = (slots < start[:, None])[:, None, :].expand(-1, width, -1).contiguous()
                mask.scatter_(2, own[:, None, :].expand(-1, width, -1), visible)
            return F.scaled_dot_product_attention(
                q, state.keys[:, :, :span], state.values[:, :, :span], attn_mask=mask[:, None], enable_gqa=True
            )

        return attend
