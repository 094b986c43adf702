"""Averaging weights: one drafter out of several of one architecture, at no cost while decoding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from draftsmith.drafters.base import Drafter
from draftsmith.foundation.errors import UserError


def averaged(drafters: Mapping[str, Drafter], weights: Sequence[float] | None = None) -> Drafter:
    """θ = Σ λ_i θ_i / Σ λ_i, summed in float32 (float64 stays) and kept in the drafters' own format.

    Args:
        drafters: by name, which errors mention; all of one kind, shape and draft vocabulary.
        weights: λ, one for each; default: equal parts.

    Raises:
        UserError: a drafter has no weights (n-grams), differs from the first in kind, options, vocabulary or shapes, or
            λ does not fit.
    """
    names = list(drafters)
    given: list[Any] = list(drafters.values())
    shares = [1.0] * len(given) if weights is None else [float(w) for w in weights]
    if not given or len(shares) != len(given):
        raise UserError(f"average needs a weight for each of its {len(given)} drafters, got {len(shares)}")
    total = math.fsum(shares)
    if not math.isfinite(total) or total == 0:
        raise UserError(f"average: the weights {shares} have no usable sum; give parts such as 0.5/0.5")
    for name, drafter in drafters.items():
        _alike(names[0], given[0], name, drafter)
    tensors = [drafter.state_dict() for drafter in given]
    mixed = {}
    for key, first in tensors[0].items():
        if not first.is_floating_point():
            mixed[key] = first
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        parts = [t[key].to(wide) * (share / total) for t, share in zip(tensors, shares, strict=True) if share]
        mixed[key] = torch.stack(parts).sum(0).to(first.dtype)
    # The target's embedding is shared by all heads of a target: no copy of it.
    embedding = getattr(given[0], "embedding", None)
    kept = {id(embedding): embedding} if isinstance(embedding, torch.Tensor) else {}
    made: Any = copy.deepcopy(given[0], kept)
    made.load_state_dict(mixed)
    result: Drafter = made
    return result


def _alike(first_name: str, first: Any, name: str, drafter: Any) -> None:
    vocabularies = first.vocab.digest, drafter.vocab.digest
    if not isinstance(drafter, nn.Module):
        raise UserError(f"average: {name} has no weights that could be averaged; leave it out")
    if type(drafter) is not type(first):
        raise UserError(
            f"average: {name} is of kind {type(drafter).__name__}, {first_name} of kind {type(first).__name__}: only "
            "drafters of one architecture can be averaged"
        )
    ours, theirs = _options(first), _options(drafter)
    for field in sorted({*ours, *theirs}):
        if ours.get(field) != theirs.get(field):
            raise UserError(
                f"average: {name} has {field} {theirs.get(field)!r}, {first_name} {ours.get(field)!r}: only drafters "
                "of one shape can be averaged"
            )
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"average: {name} and {first_name} draft from different vocabularies: train them with the same one"
        )
    shapes = [{key: tuple(t.shape) for key, t in d.state_dict().items()} for d in (first, drafter)]
    if shapes[0] != shapes[1]:
        odd = next(k for k in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(k) != shapes[1].get(k))
        raise UserError(f"average: {name} and {first_name} differ in the shape of {odd}")


def _options(drafter: Any) -> dict[str, Any]:
    options = getattr(drafter, "options", None)
    return dict(options.model_dump()) if options is not None else {}
