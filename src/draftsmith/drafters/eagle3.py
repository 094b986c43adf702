"""EAGLE-3 head (2503.01840): one decoder layer over the token's embedding and a fusion of three of the target's layers.

    g_p = W_fc [h^low_p ; h^mid_p ; h^high_p]        true context
    a_p = Layer(norm(e(x_{p+1})) ‖ norm(g_p))         first drafted token: softmax(W norm(a_p)) ≈ P(x_{p+2} | …)
    deeper tokens read the head's own a in the place of g

Tensor names are those of published checkpoints. EAGLE-3.1's variants (`fc_norm`, `norm_before_fc`, `norm_output`) and
vLLM's `norm_before_residual` are options; all off is what every server loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.drafters.head import MLP, Attention, Head, HeadOptions, RMSNorm, norm_scale, sizes
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
    return Eagle3Options(
        **sizes(config, spec, draft_vocab_size), target_hidden_size=config.hidden_size, auxiliary_layers=chosen
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
        if norm is not None:
            self.norm.weight.copy_(norm_scale(norm, self.options.target_hidden_size))
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

    @property
    def decoder(self) -> DraftLayer:
        return self.midlayer

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.midlayer.hidden_norm(hidden)
        x = torch.cat([self.midlayer.input_layernorm(embeds), normed], dim=-1)
        return x, normed if self.options.norm_before_residual else hidden

    def passed_on(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm(states)
        return normed if self.options.norm_output else states

    def judged(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm(states)
        return normed

    @property
    def output(self) -> Tensor:
        return self.lm_head.weight
