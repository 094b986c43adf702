"""EAGLE-3 head (2503.01840): one decoder layer over the token's embedding and a fusion of three of the target's layers.

    g_p = W_fc [h^low_p ; h^mid_p ; h^high_p]        true context
    a_p = Layer(norm(e(x_{p+1})) ‖ norm(g_p))         first drafted token: softmax(W norm(a_p)) ≈ P(x_{p+2} | …)
    deeper tokens read the head's own a in the place of g

Tensor names are those of published checkpoints. EAGLE-3.1's variants (`fc_norm`, `norm_before_fc`, `norm_output`) and
vLLM's `norm_before_residual` are options; all off is what every server loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.drafters.head import MLP, Attend, Attention, Head, HeadOptions, RMSNorm, rotary_parameters
from draftsmith.target.protocol import FeatureSpec, TargetSpec
from draftsmith.target.vocabulary import VocabMap

FC_NOISE = 0.3  # what is left of fc's random start beside the layer that is passed through


class Eagle3Options(HeadOptions):
    """Shape of an EAGLE-3 head."""

    auxiliary_layers: tuple[int, ...]
    target_hidden_size: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


def default_layers(layers: int) -> tuple[int, int, int]:
    """The auxiliary layers servers assume for a target of n layers: 2, n//2, n−3."""
    return (2, layers // 2, layers - 3)


def auxiliary_layers(chosen: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """The auxiliary layers in order; the default ones where none are chosen.

    Raises:
        ValueError: some collide, or are none of the target's, or the last boundary (its state is normed in
            transformers, raw in servers).
    """
    found = tuple(sorted(chosen or default_layers(layers)))
    if len(set(found)) != len(found) or not all(0 <= k < layers for k in found):
        raise ValueError(
            f"auxiliary layers {found} of a target with {layers} layers: name different ones below {layers}"
        )
    return found


def eagle3_options(
    config: Any, spec: TargetSpec, draft_vocab_size: int, layers: tuple[int, ...] | None = None
) -> Eagle3Options:
    """A head of the target's own width for a target's configuration.

    Raises:
        ValueError: as `auxiliary_layers`.
    """
    chosen = auxiliary_layers(layers, spec.layers)
    theta, scaling = rotary_parameters(config)
    heads = config.num_attention_heads
    return Eagle3Options(
        hidden_size=config.hidden_size,
        target_hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=spec.max_positions,
        vocab_size=spec.vocab_size,
        draft_vocab_size=draft_vocab_size,
        auxiliary_layers=chosen,
    )


class DraftLayer(nn.Module):
    """The decoder layer's parameters under their published names."""

    def __init__(self, o: Eagle3Options) -> None:
        super().__init__()
        self.self_attn = Attention(o, 2 * o.hidden_size)
        self.mlp = MLP(o)
        self.input_layernorm = RMSNorm(o.hidden_size, o.rms_norm_eps)
        self.hidden_norm = RMSNorm(o.hidden_size, o.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(o.hidden_size, o.rms_norm_eps)


@dataclass(frozen=True)
class UnrollBatch:
    """Packed training rows for `unroll`.

    Attributes:
        ids: `[R, L]` int64 tokens; several samples may stand one after another in a row.
        features: `[R, L, F]` the target's features at each position.
        segments: `[R, L]` int64, which sample a position belongs to; −1 for padding.
        positions: `[R, L]` int64, position within the sample.
        starts: `[R, Q]` int64, the positions p (indices into the row) from which drafts are unrolled; padded with any
            index.
        active: `[R, Q]` bool, which of them are real.
    """

    ids: Tensor
    features: Tensor
    segments: Tensor
    positions: Tensor
    starts: Tensor
    active: Tensor


@dataclass(frozen=True)
class StepOut:
    """States `[R, Q, H]` after an unrolled step, to be judged through the head's `norm` and `lm_head`."""

    step: int
    states: Tensor


class Eagle3(Head):
    """The head. `vocab` maps its draft vocabulary to the target's; `embedding [V, H]` is the target's."""

    KIND = "eagle3"
    LABEL = "EAGLE-3 head"
    OPTIONS = Eagle3Options
    options: Eagle3Options

    def __init__(self, o: Eagle3Options, vocab: VocabMap, embedding: Tensor) -> None:
        super().__init__(o, vocab, embedding)
        wide = len(o.auxiliary_layers) * o.target_hidden_size
        self.fc = nn.Linear(wide, o.hidden_size, bias=False)
        if o.norm_before_fc:
            self.input_norm = RMSNorm(wide, o.rms_norm_eps)
        if o.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(o.target_hidden_size, o.rms_norm_eps) for _ in o.auxiliary_layers)
        self.midlayer = DraftLayer(o)
        self.norm = RMSNorm(o.hidden_size, o.rms_norm_eps)
        self.lm_head = nn.Linear(o.hidden_size, o.draft_vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=o.initializer_range)

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec(self.options.auxiliary_layers)

    @torch.no_grad()
    def begin_from(self, output_embedding: Tensor, norm: nn.Module | None) -> None:
        """Let `lm_head` begin as the draft vocabulary's rows of the target's `[V, H]`, the last norm as its norm."""
        ids = self.vocab.target_ids.to(output_embedding.device)
        self.lm_head.weight.copy_(output_embedding[ids])
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor):
            self.norm.weight.copy_(weight)
        size = self.options.hidden_size
        if size == self.options.target_hidden_size:
            self.fc.weight.mul_(FC_NOISE)
            self.fc.weight[:, -size:] += torch.eye(size, device=self.fc.weight.device)

    def fuse(self, features: Tensor) -> Tensor:
        o = self.options
        # vLLM's and SGLang's order where both are on: first over all layers together, then layer by layer.
        if o.norm_before_fc:
            features = self.input_norm(features)
        if o.fc_norm:
            parts = torch.split(features, o.target_hidden_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        fused: Tensor = self.fc(features)
        return fused

    def layer(self, embeds: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x, residual = self._inputs(embeds, hidden)
        attention = self.midlayer.self_attn
        q = self.rotary.turn(attention.heads(attention.q_proj(x)), positions)
        return self._rest(residual, attend(q, *self._keys_values(x, positions)))

    def passed_on(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm(states)
        return normed if self.options.norm_output else states

    def log_q(self, states: Tensor) -> Tensor:
        return F.log_softmax(self.lm_head(self.norm(states)).float(), dim=-1)

    def unroll(self, batch: UnrollBatch, steps: int, detach_steps: bool = False) -> Iterator[StepOut]:
        """Training-time test: draft `steps` tokens from every start, each step reading the head's own states.

        Step k of the draft that starts at p reads (own state of step k−1, token p+1+k) at rotary position p+k, and
        attends to the true rows up to p (the keys of step 0, one causal mask for all steps) and to its own rows of
        steps 1…k: one key each, so k extra columns and not another `[L, L]` block. Equal to `observe` and `expand` of a
        chain, step by step.

        Prompt positions enter as keys and values only: nothing is drafted from them.
        """
        attention = self.midlayer.self_attn
        starts, width = batch.starts, batch.ids.shape[1]
        self.rotary.reach(int(batch.positions.max()) + steps + 1, batch.ids.device)
        following = F.pad(batch.ids[:, 1:], (0, 1))
        states = self.fuse(batch.features)
        x, residual = self._inputs(self.embed(following).to(states.dtype), states)
        keys, values = self._keys_values(x, batch.positions)
        origin = batch.positions.gather(1, starts)
        causal = torch.arange(width, device=starts.device) <= starts[:, :, None]
        same = batch.segments[:, None, :] == batch.segments.gather(1, starts)[:, :, None]
        mask = (causal & same)[:, None]
        x, residual = _rows(x, starts), _rows(residual, starts)
        q = self.rotary.turn(attention.heads(attention.q_proj(x)), origin)
        groups = self.options.num_attention_heads // self.options.num_key_value_heads
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        states = self._rest(residual, mixed)
        yield StepOut(0, states)
        own: list[tuple[Tensor, Tensor]] = []
        full_keys, full_values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        penalty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)
        for step in range(1, steps):
            reads = self.passed_on(states.detach() if detach_steps else states)
            tokens = batch.ids.gather(1, (starts + 1 + step).clamp(max=width - 1))
            x, residual = self._inputs(self.embed(tokens).to(states.dtype), reads)
            position = origin + step
            q = self.rotary.turn(attention.heads(attention.q_proj(x)), position)
            k, v = self._keys_values(x, position)
            own.append((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
            states = self._rest(residual, _attend_with_own(q, full_keys, full_values, own, penalty))
            yield StepOut(step, states)

    def _inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.midlayer.hidden_norm(hidden)
        x = torch.cat([self.midlayer.input_layernorm(embeds), normed], dim=-1)
        return x, normed if self.options.norm_before_residual else hidden

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.midlayer.self_attn
        return self.rotary.turn(attention.heads(attention.k_proj(x)), positions), attention.heads(attention.v_proj(x))

    def _rest(self, residual: Tensor, mixed: Tensor) -> Tensor:
        states = residual + self.midlayer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = states + self.midlayer.mlp(self.midlayer.post_attention_layernorm(states))
        return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _attend_with_own(
    q: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]], penalty: Tensor
) -> Tensor:
    """Attention over shared keys `[R, heads, L, d]` and each query's own keys of the steps so far (the diagonal)."""
    scale = q.shape[-1] ** -0.5
    shared = (q @ keys.transpose(2, 3)).float() * scale + penalty
    diagonal = torch.stack([(q * k).sum(-1) for k, _ in own], dim=-1).float() * scale
    weights = torch.cat([shared, diagonal], dim=-1).softmax(dim=-1).to(values.dtype)
    mixed = weights[..., : keys.shape[2]] @ values
    for i, (_, v) in enumerate(own):
        mixed = mixed + weights[..., keys.shape[2] + i, None] * v
    return mixed
