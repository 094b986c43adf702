"""A target's linear layers with weights in the order in which the processor's matrix kernels read them (oneDNN).

torch brings bfloat16 weights into that order at every call on a CPU; here that is done once. The kernels are then those
of one row for any number of rows, and a row's result does not depend on how many others it is computed with: what a
round verifies is, bit for bit, what plain decoding computes in these layers. It costs a second copy of the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.foundation.errors import UserError

HALF = (torch.bfloat16, torch.float16)
ONE_ROW = 1  # the number of rows that the order is chosen for: others' kernels round by the number of rows


class PackedLinear(nn.Linear):
    """A linear layer, frozen, beside whose weight stands a packed copy; made by `pack`."""

    _packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        # who copies a layer means to train it, and a packed copy would not learn
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        for name, parameter in self.named_parameters():
            setattr(made, name, copy.deepcopy(parameter, memo))
        return made.train(self.training)


@torch.no_grad()
def pack(model: nn.Module, name: str) -> None:
    """Pack all linear layers of a frozen model, in place.

    Raises:
        UserError: it is not in half precision on a CPU, or this build of torch has no such kernels.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if not layers or any(layer.weight.dtype not in HALF or layer.weight.device.type != "cpu" for layer in layers):
        raise UserError(
            f"{name}: packed weights are for half precision on a CPU (in float32 they gain nothing): set target.dtype "
            "to bfloat16, or target.kernels to plain"
        )
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight, ONE_ROW) for layer in layers]
    except (AttributeError, RuntimeError) as problem:
        raise UserError(
            f"{name}: this torch or processor can't pack {layers[0].weight.dtype} weights "
            f"({(str(problem) or 'no message').splitlines()[0]}): set target.kernels to plain"
        ) from problem
    for layer, weight in zip(layers, packed, strict=True):
        layer.__class__ = PackedLinear
        layer._packed = weight


def packed(model: nn.Module) -> bool:
    """Whether `pack` was there."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
