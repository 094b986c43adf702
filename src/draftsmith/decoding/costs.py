"""How many nodes pay for their verification. Stored costs decide, never live clocks: a run can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.tree import DraftTree, pruned
from draftsmith.foundation.artefacts import read_json
from draftsmith.foundation.errors import UserError


def best_sizes(values: Tensor, round_ms: Sequence[float]) -> Tensor:
    """The number of nodes that maximises expected committed tokens per second in each sequence (2606.01813).

    With the nodes' path probabilities V sorted, k nodes commit E(k) = 1 + Σ_{i ≤ k} V_i tokens in expectation, the
    bonus included; the k ≤ K of largest E(k) / round_ms[k] is taken, of equals the smallest.

    Args:
        values: `[B, M]` path probabilities in descending order, 0 where a row has no more nodes.
        round_ms: milliseconds of a round (drafting and verification) of 0 … K nodes.

    Returns:
        `[B]` int64, each at most min(K, M).
    """
    most = min(len(round_ms) - 1, values.shape[1])
    expected = torch.nn.functional.pad(values[:, :most].double().cumsum(1), (1, 0)) + 1
    return (expected / torch.tensor(round_ms[: most + 1], dtype=torch.float64, device=values.device)).argmax(dim=1)


def affordable(tree: DraftTree, round_ms: Sequence[float], room: Tensor | None = None) -> DraftTree:
    """Of each tree the likeliest nodes, as many as `best_sizes` says; each sequence decides for itself.

    Args:
        round_ms: milliseconds of a round of 0 … K nodes.
        room: as in `pruned`.
    """
    value = tree.log_q.masked_fill(~tree.real, -torch.inf)
    if room is not None:
        value = value.masked_fill(tree.depths > room[:, None], -torch.inf)
    order = value.sort(dim=1, descending=True, stable=True)
    size = best_sizes(order.values.exp(), round_ms)
    surplus = torch.arange(tree.size, device=value.device) >= size[:, None]
    kept = torch.empty_like(value).scatter_(1, order.indices, order.values.masked_fill(surplus, -torch.inf))
    return pruned(replace(tree, log_q=kept), len(round_ms) - 1)


def stored_round_costs(
    path: Path, budget: int, depth: int, width: int, draft_ms: float | None = None, sequences: int = 1
) -> tuple[float, ...]:
    """Milliseconds of a round of 0 … `budget` nodes, from a stored profile.

    Args:
        path: JSON as `tune` writes it: `{"verify_ms": {rows: ms}, "growths": [{"growth": …, "draft_ms": …}]}`.
        depth, width: what is drafted before the number of nodes is chosen.
        draft_ms: milliseconds of drafting; default: the profile's for a dynamic tree of this depth and width, else
            its own entry `draft_ms`.
        sequences: sequences decoded together; a pass then verifies the rows of all.

    Raises:
        UserError: the file is missing or has no usable costs; the text names the file and the entry.
    """
    # `profile` measures compositions, which are made of growths, which need this module.
    from draftsmith.decoding.profile import interpolated

    stored = read_json(path)
    if not isinstance(stored, Mapping):
        raise UserError(f"{path}: expected a profile, a JSON object with verify_ms")
    costs = _verify_ms(path, stored.get("verify_ms"))
    draft = _draft_ms(path, stored, depth, width) if draft_ms is None else draft_ms
    return tuple(draft + interpolated(costs, sequences * (1 + k)) for k in range(budget + 1))


def _verify_ms(path: Path, entry: object) -> dict[int, float]:
    problem = UserError(f"{path}: verify_ms must map numbers of rows to milliseconds above 0, as `tune` stores them")
    if not isinstance(entry, Mapping) or not entry:
        raise problem
    try:
        costs = {int(rows): float(ms) for rows, ms in entry.items()}
    except (TypeError, ValueError):
        raise problem from None
    if not all(rows > 0 and 0 < ms < float("inf") for rows, ms in costs.items()):
        raise problem
    return costs


def _draft_ms(path: Path, stored: Mapping[str, Any], depth: int, width: int) -> float:
    measured = [
        row.get("draft_ms")
        for row in stored.get("growths", ())
        if (grown := row.get("growth", {})).get("kind", "dynamic") == "dynamic"
        and (grown.get("depth"), grown.get("width")) == (depth, width)
    ]
    draft = measured[0] if measured else stored.get("draft_ms")
    if not isinstance(draft, int | float) or draft < 0:
        raise UserError(
            f"{path} holds no draft_ms for a tree of depth {depth} and width {width}: set the growth's draft_ms, or "
            "a depth and width that were measured"
        )
    return float(draft)
