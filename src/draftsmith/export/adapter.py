"""From draftsmith's own modules to what the exporters take: the head as a plain checkpoint, the target as a card."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from draftsmith.decoding.growth import GrowthOptions, StaticGrowth
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.checkpoint import Saved
from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options
from draftsmith.export.checkpoint import Golden, HeadCheckpoint, Serving, TargetCard
from draftsmith.export.validate import Forward
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.target.model import HFTarget

GOLDEN_ROWS = 24


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


def head_checkpoint(head: Saved, card: TargetCard) -> HeadCheckpoint:
    """A trained head as the exporters take it, in its own number format.

    Raises:
        UserError: it is no head.
    """
    head = _eagle3(head)
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    return HeadCheckpoint("eagle3", head.options.model_dump(mode="json"), tensors, head.vocab, card)


def serving(growth: GrowthOptions, tokens: int) -> Serving:
    """The numbers of a growth as servers name them; `tokens` for those that draft chains."""
    built = growth.build()
    if isinstance(built, StaticGrowth):
        width = 1 + max(rank for path in built.paths for rank in path)
        return Serving(tokens, built.depth, width, built.budget)
    width = 1 if growth.kind in ("chain", "adaedl") else growth.width
    return Serving(tokens, growth.depth, width, built.budget)


def golden(head: Saved) -> Golden:
    """A stored forward pass of a head in float32: random features and tokens, two drafted nodes, and what came out."""
    head = _eagle3(head)
    generator = torch.Generator().manual_seed(0)
    wide = len(head.options.auxiliary_layers) * head.options.target_hidden_size
    inputs = {
        "tokens": torch.randint(0, head.options.vocab_size, (1, GOLDEN_ROWS + 1), generator=generator),
        "features": torch.randn((1, GOLDEN_ROWS + 1, wide), generator=generator),
        "drafted": torch.randint(0, head.options.vocab_size, (1, 2), generator=generator),
    }
    return Golden(inputs, forward(head, inputs))


@torch.inference_mode()
def forward(head: Eagle3, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pass that `golden` stores: `log_q [3, Vd]` after the last token and after each of two tokens drafted on."""
    copy = Eagle3(head.options, head.vocab, head.embedding.detach().cpu().float())
    copy.load_state_dict({name: tensor.detach().cpu().float() for name, tensor in head.state_dict().items()})
    state = copy.start(1, GOLDEN_ROWS + 4)
    rows = [copy.observe(state, inputs["tokens"], inputs["features"], [inputs["tokens"].shape[1]]).log_q[0]]
    for depth, parent in ((1, -1), (2, 0)):
        token = inputs["drafted"][:, depth - 1 : depth]
        rows.append(copy.expand(state, Frontier(token, torch.tensor([[parent]]), depth)).log_q[0])
    return {"log_q": torch.cat(rows)}


def drafter_of(checkpoint: HeadCheckpoint, target: HFTarget, where: str) -> Eagle3:
    """A checkpoint that `import_checkpoint` read, as a drafter in float32; `where` names it in errors.

    Raises:
        UserError: a head that is not decoded here, or options that do not fit it.
    """
    if checkpoint.kind != "eagle3":
        raise UserError(f"{where}: an EAGLE-1/2 or HASS head; this version decodes EAGLE-3 heads only")
    head = Eagle3(validate(Eagle3Options, dict(checkpoint.config), where), checkpoint.vocab, target.embedding.float())
    head.load_state_dict(dict(checkpoint.tensors))
    return head.to(target.device).eval().requires_grad_(False)


def checker(embedding: Tensor) -> Forward:
    """`forward` for a checkpoint that `validate.check` has read; `embedding [V, H]` is the target's."""

    def run(checkpoint: HeadCheckpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        options = validate(Eagle3Options, dict(checkpoint.config), "config.json")
        head = Eagle3(options, checkpoint.vocab, embedding)
        head.load_state_dict(dict(checkpoint.tensors))
        return forward(head, inputs)

    return run


def _eagle3(drafter: Saved) -> Eagle3:
    if not isinstance(drafter, Eagle3):
        raise UserError(f"a drafter of kind {drafter.KIND} can't be exported by this version")
    return drafter
