"""Specialists over one set of weights: low-rank updates of a head's layers, several of them in one batched pass.

    y = W x + scale · B_i (A_i x)        LoRA (2106.09685), i the specialist

`adapted` makes a trainable specialist of a head, whose own weights stay frozen and shared. `stacked` puts trained ones
together into one head that runs them side by side: its batch holds all sequences of the first specialist, then all of
the second, and so on, W is multiplied once with all of them, and A and B block by block. `decoding/stacked.py` drafts
with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from draftsmith.drafters.head import Head
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError

OUTPUT = "lm_head"  # trained and judged through its own weights: stays the trunk's

H = TypeVar("H", bound=Head)


class LowRank(nn.Module):
    """A linear layer with an update for each of N specialists; the rows of `x [N·B, T, in]` are theirs in turn."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down)  # [N, r, in]
        self.up = nn.Parameter(up)  # [N, out, r]
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        own = x.reshape(self.down.shape[0], -1, x.shape[-1])
        update = torch.bmm(torch.bmm(own, self.down.transpose(1, 2)), self.up.transpose(1, 2))
        return out + self.scale * update.view(out.shape)


def adapted(head: H, rank: int = 16, alpha: float = 32.0, seed: int = 0) -> H:
    """A specialist to train: the head with a low-rank update in each linear layer but `lm_head`, at first the same.

    Its trunk is the given head's, tensor for tensor, and frozen. `scale = alpha / rank`, A is seeded, B is zero.

    Raises:
        UserError: the head is adapted already.
    """
    if updates(head):
        raise UserError("this head has low-rank updates already: adapt the one it was made from")
    made = _sharing(head)
    for name, layer in _linears(made).items():
        generator = torch.Generator().manual_seed(seeding.key("adapter", seed, name) % 2**63)
        down = torch.randn(1, rank, layer.in_features, generator=generator) / layer.in_features**0.5
        up = torch.zeros(1, layer.out_features, rank)
        weight = layer.weight
        _put(made, name, LowRank(layer, down.to(weight), up.to(weight), alpha / rank))
    return made


def updates(head: nn.Module) -> dict[str, LowRank]:
    """The low-rank layers of a head by name; none for a head that is not adapted."""
    return {name: layer for name, layer in head.named_modules() if isinstance(layer, LowRank)}


def specialists(head: nn.Module) -> int:
    """How many specialists a head runs side by side; 0 where it is not adapted."""
    return next((layer.down.shape[0] for layer in updates(head).values()), 0)


def stacked(heads: Mapping[str, H]) -> H:
    """One head that runs adapted heads of one trunk side by side, in their order.

    Raises:
        UserError: a head is not adapted, or has another trunk, other layers, rank or scale than the first.
    """
    first_name, *_ = heads
    first = heads[first_name]
    wanted = updates(first)
    for name, head in heads.items():
        own = updates(head)
        if not own:
            raise UserError(f"{name} has no low-rank updates: only specialists of one trunk run side by side")
        trunk, theirs = (_trunk(h) for h in (first, head))
        if trunk.keys() != theirs.keys() or not all(_same(t, theirs[k]) for k, t in trunk.items()):
            raise UserError(f"{name} stands on another trunk than {first_name}")
        shapes = [[(k, u.down.shape[1:], u.scale) for k, u in us.items()] for us in (wanted, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} has other layers, rank or scale than {first_name}")
    made = _sharing(first)
    for name in wanted:
        layers = [updates(head)[name] for head in heads.values()]
        down, up = (torch.cat([getattr(u, part).detach() for u in layers]) for part in ("down", "up"))
        _put(made, name, LowRank(layers[0].base, down, up, layers[0].scale))
    return made.requires_grad_(False)


def alike(heads: Sequence[object]) -> bool:
    """Whether these are adapted heads that can be stacked."""
    found = {str(i): head for i, head in enumerate(heads) if isinstance(head, Head)}
    if len(found) < max(len(heads), 2) or any(specialists(head) != 1 for head in found.values()):
        return False
    try:
        stacked(found)
    except UserError:
        return False
    return True


def _sharing(head: H) -> H:
    """A copy of the modules, frozen, around the same memory."""
    kept: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in head.parameters()}
    kept[id(head.embedding)] = head.embedding
    return copy.deepcopy(head, kept)


def _linears(head: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in head.named_modules() if isinstance(m, nn.Linear) and name != OUTPUT}


def _put(head: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, own = name.rpartition(".")
    setattr(head.get_submodule(above), own, layer)


def _trunk(head: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in head.named_parameters() if not k.endswith((".down", ".up"))}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or bool(torch.equal(one, other)))
