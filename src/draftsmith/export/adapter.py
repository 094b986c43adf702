"""From draftsmith's own modules to what the exporters take: the head as a plain checkpoint, the target as a card."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.export.checkpoint import Golden, HeadCheckpoint, TargetCard
from draftsmith.target.model import HFTarget

GOLDEN_ROWS = 6


def target_card(target: HFTarget, served_as: str, licence: str = "") -> TargetCard:
    """The target's card.

    Args:
        served_as: what a server is given to load it: a hub id or a folder.
    """
    quantised = "de-quantised" in target.spec.name
    return TargetCard.from_config(
        target.model.config.to_dict(),
        name=served_as,
        fingerprint=target.spec.fingerprint,
        quantisation=target.spec.name if quantised else "",
        licence=licence,
    )


def head_checkpoint(head: Eagle3, card: TargetCard) -> HeadCheckpoint:
    """A trained head as the exporters take it, in its own number format."""
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    return HeadCheckpoint("eagle3", head.options.model_dump(mode="json"), tensors, head.vocab, card)


def golden(head: Eagle3) -> Golden:
    """A stored forward pass of a head: rows of random features and tokens, and the log probabilities that came out."""
    generator = torch.Generator().manual_seed(0)
    wide = len(head.options.auxiliary_layers) * head.options.target_hidden_size
    inputs = {
        "tokens": torch.randint(0, head.options.vocab_size, (1, GOLDEN_ROWS + 1), generator=generator),
        "features": torch.randn((1, GOLDEN_ROWS + 1, wide), generator=generator),
    }
    return Golden(inputs, forward(head, inputs))


@torch.inference_mode()
def forward(head: Eagle3, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pass that `golden` stores: `log_q [Vd]` after the last token, float32."""
    state = head.start(1, GOLDEN_ROWS + 1)
    proposal = head.observe(state, inputs["tokens"], inputs["features"], [inputs["tokens"].shape[1]])
    return {"log_q": proposal.log_q[0, 0].cpu()}
