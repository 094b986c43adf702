"""From draftsmith's own modules to what the exporters take, and back: drafters as plain checkpoints, the target as a
card.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from draftsmith.decoding.growth import GrowthOptions, StaticGrowth
from draftsmith.drafters import checkpoint as saved
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.checkpoint import Saved
from draftsmith.drafters.standalone import FOLDER, Standalone, StandaloneDraftOptions, load_model
from draftsmith.export.checkpoint import Drafter, Golden, HeadCheckpoint, Kind, Serving, StandaloneDraft, TargetCard
from draftsmith.export.validate import Forward
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap

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


def exportable(drafter: Saved, folder: Path, card: TargetCard) -> Drafter:
    """A trained drafter as the exporters take it; `folder` is its artefact.

    Raises:
        UserError: a kind that no server runs.
    """
    if isinstance(drafter, Standalone):
        return StandaloneDraft(folder / FOLDER, card)
    return head_checkpoint(drafter, card)


def head_checkpoint(head: Saved, card: TargetCard) -> HeadCheckpoint:
    """A trained head as the exporters take it, in its own number format.

    An EAGLE head proposes the whole vocabulary in servers: it multiplies with the target's own output embedding.

    Raises:
        UserError: it is no head.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in head.tensors().items() if name not in ("d2t", "t2d")}
    config = head.options.model_dump(mode="json")
    kinds: dict[str, Kind] = {"eagle": "eagle", "eagle3": "eagle3"}
    if head.KIND not in kinds:
        raise UserError(f"a drafter of kind {head.KIND} is no head, and can't be exported as one")
    if head.KIND == "eagle":
        vocab = VocabMap.identity(int(config["vocab_size"]))
        config.pop("draft_vocab_size")
        return HeadCheckpoint("eagle", config, tensors, vocab, card)
    return HeadCheckpoint(kinds[head.KIND], config, tensors, head.vocab, card)


def drafter_of(checkpoint: HeadCheckpoint, target: HFTarget, where: str) -> Saved:
    """A checkpoint that `import_checkpoint` read, as a drafter in float32; `where` names it in errors.

    Raises:
        UserError: options that do not fit the head.
    """
    vocab = checkpoint.vocab
    options = {**checkpoint.config, "draft_vocab_size": vocab.size}
    tensors = {**checkpoint.tensors, "d2t": vocab.d2t, "t2d": vocab.t2d}
    head = saved.kind(checkpoint.kind, where).from_saved(options, tensors, target, where)
    assert isinstance(head, nn.Module)
    head.to(target.device, torch.float32).eval().requires_grad_(False)
    return head


def standalone_of(folder: Path, target: HFTarget) -> Standalone:
    """A model folder as a draft of the whole vocabulary, in float32: what servers run.

    Raises:
        UserError: nothing loadable, or another vocabulary than the target's.
    """
    size = target.spec.vocab_size
    model = load_model(folder, size, torch.float32)
    options = StandaloneDraftOptions(made_from=str(folder), vocab_size=size, draft_vocab_size=size)
    draft = Standalone(options, VocabMap.identity(size), model, target.tokenizer)
    return draft.to(target.device).eval().requires_grad_(False)


def serving(growth: GrowthOptions, tokens: int) -> Serving:
    """The numbers of a growth as servers name them; `tokens` for those that draft chains."""
    built = growth.build()
    if isinstance(built, StaticGrowth):
        width = 1 + max(rank for path in built.paths for rank in path)
        return Serving(tokens, built.depth, width, built.budget)
    width = 1 if growth.kind in ("chain", "adaedl") else growth.width
    return Serving(tokens, growth.depth, width, built.budget)


def golden(checkpoint: HeadCheckpoint, target: HFTarget) -> Golden:
    """A stored forward pass of a head in float32: random features and tokens, two drafted nodes, and what came out."""
    head = drafter_of(checkpoint, target, "the head")
    generator = torch.Generator().manual_seed(0)
    wide = len(head.wants.names) * target.spec.hidden_size
    inputs = {
        "tokens": torch.randint(0, target.spec.vocab_size, (1, GOLDEN_ROWS + 1), generator=generator),
        "features": torch.randn((1, GOLDEN_ROWS + 1, wide), generator=generator),
        "drafted": torch.randint(0, target.spec.vocab_size, (1, 2), generator=generator),
    }
    return Golden(inputs, forward(head, inputs, target.device))


@torch.inference_mode()
def forward(head: Saved, inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The pass that `golden` stores: `log_q [3, Vd]` after the last token and after each of two tokens drafted on."""
    copy = deepcopy(head)
    assert isinstance(copy, nn.Module)
    copy.float()
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    state = copy.start(1, GOLDEN_ROWS + 4)
    rows = [copy.observe(state, given["tokens"], given["features"], [given["tokens"].shape[1]]).log_q[0]]
    for depth, parent in ((1, -1), (2, 0)):
        token = given["drafted"][:, depth - 1 : depth]
        rows.append(copy.expand(state, Frontier(token, torch.tensor([[parent]], device=device), depth)).log_q[0])
    return {"log_q": torch.cat(rows).cpu()}


def checker(target: HFTarget) -> Forward:
    """`forward` for a checkpoint that `validate.check` has read."""

    def run(checkpoint: HeadCheckpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return forward(drafter_of(checkpoint, target, "config.json"), inputs, target.device)

    return run
