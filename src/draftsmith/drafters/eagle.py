"""EAGLE's head (2401.15077, §3), which EAGLE-2 (2406.16858) decodes with better trees and HASS (2408.15766) trains
better: it predicts the target's next final state.

    x_p = W_fc [e(x_{p+1}) ; f_p]          f_p: the target's final state at p, after the last norm
    f̂_{p+1} = Layer(x_p)                   without a norm before attention, and without one at the end
    softmax(W f̂_{p+1}) ≈ P(x_{p+2} | …)    W: the target's own output embedding, shared and frozen
    deeper tokens read the head's own f̂ in the place of f

Tensor names are those of published checkpoints. Over a draft vocabulary only its rows of W are multiplied: the weights
are the same, so that a head exported to servers proposes the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from draftsmith.drafters.head import MLP, Attention, Head, HeadOptions, RMSNorm, sizes
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, TargetSpec
from draftsmith.target.vocabulary import VocabMap

FC_NOISE = 0.3  # what is left of fc's random start beside the state that is passed through


class EagleOptions(HeadOptions):
    """Shape of an EAGLE head."""

    fc_bias: bool = False


def eagle_options(config: Any, spec: TargetSpec, draft_vocab_size: int | None = None) -> EagleOptions:
    """A head for a target's configuration; it proposes the whole vocabulary by default."""
    return EagleOptions(**sizes(config, spec, draft_vocab_size or spec.vocab_size))


class EagleLayer(nn.Module):
    """The decoder layer's parameters under their published names."""

    def __init__(self, o: EagleOptions) -> None:
        super().__init__()
        self.self_attn = Attention(o, o.hidden_size)
        self.mlp = MLP(o)
        self.post_attention_layernorm = RMSNorm(o.hidden_size, o.rms_norm_eps)


class Eagle(Head):
    """The head. `embedding [V, H]` is the target's, `output [Vd, H]` its output embedding's rows of the vocabulary."""

    KIND = "eagle"
    LABEL = "EAGLE head"
    OPTIONS = EagleOptions
    options: EagleOptions

    def __init__(self, o: EagleOptions, vocab: VocabMap, embedding: Tensor, output: Tensor) -> None:
        super().__init__(o, vocab, embedding)
        self._output = (output,)
        self.fc = nn.Linear(2 * o.hidden_size, o.hidden_size, bias=o.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(o)])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=o.initializer_range)

    @classmethod
    def for_target(cls, o: HeadOptions, vocab: VocabMap, target: HFTarget) -> Self:
        assert isinstance(o, EagleOptions)
        return cls(o, vocab, target.embedding, target.output_rows(None if vocab.is_identity else vocab.target_ids))

    @property
    def wants(self) -> FeatureSpec:
        return FeatureSpec(final=True)

    @torch.no_grad()
    def begin(self) -> None:
        """Let `fc` begin by passing the target's state through, most of its random start gone."""
        size = self.options.hidden_size
        self.fc.weight.mul_(FC_NOISE)
        self.fc.weight[:, size:] += torch.eye(size, device=self.fc.weight.device)

    def fuse(self, features: Tensor) -> Tensor:
        return features

    @property
    def decoder(self) -> nn.Module:
        return self.layers[0]

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(torch.cat([embeds, hidden], dim=-1))
        return x, x

    @property
    def output(self) -> Tensor:
        return self._output[0]
