"""How many nodes pay for their verification. Stored costs decide, never live clocks: a run can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.tree import DraftTree, pruned
from draftsmith.foundation.artefacts import read_json
from draftsmith.foundation.errors import StaleError, UserError


def best_sizes(values: Tensor, round_ms: Sequence[float] | Tensor) -> Tensor:
    """The number of nodes that maximises expected committed tokens per second in each sequence (2606.01813).

    With the nodes' path probabilities V sorted, k nodes commit E(k) = 1 + Σ_{i ≤ k} V_i tokens in expectation, the
    bonus included; the k ≤ K of largest E(k) / round_ms[k] is taken, of equals the smallest.

    Args:
        values: `[B, M]` path probabilities in descending order, 0 where a row has no more nodes.
        round_ms: milliseconds of a round (drafting and verification) of 0 … K nodes, for all or `[B, K+1]`.

    Returns:
        `[B]` int64, each at most min(K, M).
    """
    return _rates(values, round_ms).argmax(dim=1)


def pays(frontier: Tensor, log_q: Tensor, round_ms: Sequence[float] | Tensor, pass_ms: float) -> Tensor:
    """Whether one more depth may be worth its draft pass in each sequence, `[B]` bool: it is not if the rate would not
    rise even if each node to expand had a child that is certain.

    Args:
        frontier: `[B, W]` path log probabilities of the nodes to expand, −inf where there is none.
        log_q: `[B, N]` those of all nodes known so far.
        round_ms: as in `best_sizes`, with the drafting that was done so far.
        pass_ms: milliseconds that the pass adds to a round.
    """
    costs = torch.as_tensor(round_ms, dtype=torch.float64, device=log_q.device)
    now = log_q.sort(dim=1, descending=True).values.exp()
    then = torch.cat([log_q, frontier], 1).sort(dim=1, descending=True).values.exp()
    return _rates(then, costs + pass_ms).amax(dim=1) > _rates(now, costs).amax(dim=1)


def _rates(values: Tensor, round_ms: Sequence[float] | Tensor) -> Tensor:
    """Expected tokens per millisecond of 0 … min(K, M) nodes, `[B, …]` float64."""
    costs = torch.as_tensor(round_ms, dtype=torch.float64, device=values.device)
    most = min(costs.shape[-1] - 1, values.shape[1])
    expected = torch.nn.functional.pad(values[:, :most].double().cumsum(1), (1, 0)) + 1
    return expected / costs[..., : most + 1]


def affordable(tree: DraftTree, round_ms: Sequence[float] | Tensor, room: Tensor | None = None) -> DraftTree:
    """Of each tree the likeliest nodes, as many as `best_sizes` says; each sequence decides for itself.

    Args:
        round_ms: as in `best_sizes`.
        room: as in `pruned`.
    """
    value = tree.log_q.masked_fill(~tree.real, -torch.inf)
    if room is not None:
        value = value.masked_fill(tree.depths > room[:, None], -torch.inf)
    order = value.sort(dim=1, descending=True, stable=True)
    size = best_sizes(order.values.exp(), round_ms)
    surplus = torch.arange(tree.size, device=value.device) >= size[:, None]
    kept = torch.empty_like(value).scatter_(1, order.indices, order.values.masked_fill(surplus, -torch.inf))
    return pruned(replace(tree, log_q=kept), torch.as_tensor(round_ms).shape[-1] - 1)


def at_contexts(table: Sequence[Sequence[float]], contexts: Sequence[int], positions: Tensor) -> Tensor:
    """Costs at each sequence's own length `positions [B]`, from those at `contexts` (ascending): linear between them,
    constant beyond the ends. `table[c][k]` → `[B, K+1]` float64."""
    rows = torch.tensor([list(row) for row in table], dtype=torch.float64, device=positions.device)
    if len(contexts) == 1:
        return rows.expand(len(positions), -1)
    known = torch.tensor(list(contexts), dtype=torch.float64, device=positions.device)
    place = positions.double().clamp(float(known[0]), float(known[-1]))
    high = torch.searchsorted(known, place).clamp(min=1)
    share = (place - known[high - 1]) / (known[high] - known[high - 1])
    return rows[high - 1] + share[:, None] * (rows[high] - rows[high - 1])


def stored_round_costs(
    path: Path,
    budget: int,
    depth: int,
    width: int,
    draft_ms: float | None = None,
    sequences: int = 1,
    context: int | None = None,
    drafter: str | None = None,
) -> tuple[float, ...]:
    """Milliseconds of a round of 0 … `budget` nodes, from a stored profile.

    Args:
        path: JSON as `draftsmith profile` writes it (`profile.to_json`), or as `tune` does: `{"verify_ms": {rows: ms},
            "growths": [{"growth": …, "draft_ms": ms or {set: ms}}]}`.
        depth, width: what is drafted before the number of nodes is chosen; between measured ones linear.
        draft_ms: milliseconds of drafting; default: the profile's for a dynamic tree of this depth and width, else
            its own entry `draft_ms`.
        sequences: sequences decoded together; a pass then verifies the rows of all.
        context: one of `stored_contexts`; default: the smallest.
        drafter: whose drafting, where the profile knows several.

    Raises:
        UserError: the file is missing or has no usable costs; the text names the file and the entry.
    """
    stored = _read(path)
    if "verify" not in stored:
        costs, each = _verify_ms(path, stored.get("verify_ms")), sequences
    else:
        entry = _entry(path, stored["verify"], sequences, context)
        costs, each = _verify_ms(path, entry.get("ms")), 1
    draft = draft_ms
    if draft is None:
        known = _shapes(path, stored, sequences, context, drafter)
        draft = _between(known, depth, width)
    if draft is None:
        draft = stored.get("draft_ms")
    if not isinstance(draft, int | float) or draft < 0:
        raise UserError(
            f"{path} holds no draft_ms for a tree of depth {depth} and width {width}: set the growth's draft_ms, or "
            "a depth and width that were measured"
        )
    return tuple(float(draft) + interpolated(costs, each * (1 + k)) for k in range(budget + 1))


def stored_pass_ms(path: Path, depth: int, width: int, sequences: int = 1, drafter: str | None = None) -> float:
    """Milliseconds that each depth below the first adds to drafting a dynamic tree, from a stored profile; 0 where it
    does not say, for then there is nothing to be saved by stopping earlier.

    Raises:
        UserError: as `stored_round_costs`.
    """
    stored = _read(path)
    if depth == 1 or "drafting" not in stored:
        return 0.0
    known = _shapes(path, stored, sequences, None, drafter)
    deep, flat = _between(known, depth, width), _between(known, 1, width)
    return max(0.0, deep - flat) / (depth - 1) if deep is not None and flat is not None else 0.0


def interpolated(costs: Mapping[int, float], rows: int) -> float:
    """Milliseconds for a number of rows between measured ones (linear), beyond the last in proportion."""
    known = sorted(costs)
    if rows <= known[0]:
        return costs[known[0]]
    for low, high in pairwise(known):
        if rows <= high:
            share = (rows - low) / (high - low)
            return costs[low] + share * (costs[high] - costs[low])
    return costs[known[-1]] * rows / known[-1]


def stored_contexts(path: Path) -> tuple[int, ...]:
    """The lengths at which a profile was measured, ascending; none where it does not say.

    Raises:
        UserError: the file is missing or no profile.
    """
    entries = _read(path).get("verify", [])
    return tuple(sorted({int(entry["context"]) for entry in entries}))


def refuse_other_target(path: Path, fingerprint: str) -> None:
    """Raises StaleError where a profile says that it was measured with another target."""
    target = _read(path).get("target")
    found = target.get("fingerprint") if isinstance(target, Mapping) else None
    if found not in (None, fingerprint):
        raise StaleError(
            f"{path} was measured with another target (fingerprint {found}, this one's is {fingerprint}): run "
            "draftsmith profile for this one"
        )


def _read(path: Path) -> Mapping[str, Any]:
    stored = read_json(path)
    if not isinstance(stored, Mapping):
        raise UserError(f"{path}: expected a profile, a JSON object with verify_ms")
    entries = stored.get("verify", [])
    if not isinstance(entries, list) or not all(
        isinstance(e, Mapping) and {"batch", "context", "ms"} <= e.keys() for e in entries
    ):
        raise UserError(f"{path}: verify must be a list of batch, context and ms, as draftsmith profile stores it")
    return stored


def _entry(path: Path, entries: Sequence[Any], batch: int, context: int | None) -> Mapping[str, Any]:
    own = sorted((e for e in entries if e.get("batch") == batch), key=lambda e: e["context"])
    if not own:
        batches = sorted({e.get("batch") for e in entries})
        raise UserError(
            f"{path} was measured with {', '.join(map(str, batches))} sequences together, not with {batch}: run "
            f"draftsmith profile with --batch {batch}, or set the growth's sequences"
        )
    if context is None:
        return dict(own[0])
    found = next((e for e in own if e["context"] == context), None)
    if found is None:
        raise UserError(f"{path} holds no costs for {batch} sequences of {context} tokens: run draftsmith profile")
    return dict(found)


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


def _shapes(
    path: Path, stored: Mapping[str, Any], batch: int, context: int | None, drafter: str | None
) -> dict[tuple[int, int], float]:
    """Milliseconds of drafting by depth and width."""
    if "drafting" in stored:
        rows = stored["drafting"]
        names = sorted({row["drafter"] for row in rows})
        if (len(names) > 1) if drafter is None else drafter not in names:
            raise UserError(f"{path} holds costs of {', '.join(names) or 'no drafter'}: say which (growth.drafter)")
        own = [row for row in rows if drafter in (None, row["drafter"]) and row["batch"] == batch]
        least = min((row["context"] for row in own), default=None)
        own = [row for row in own if row["context"] == (least if context is None else context)]
        return {(row["depth"], row["width"]): float(row["ms"]) for row in own}
    found: dict[tuple[int, int], float] = {}
    for row in stored.get("growths", ()):
        growth, ms = row.get("growth", {}), row.get("draft_ms")
        if isinstance(ms, Mapping) and ms:  # by set of prompts
            ms = sum(ms.values()) / len(ms)
        # one that stops where it does not pay drafts less than a cost-aware tree of the same depth
        whole = growth.get("kind", "dynamic") == "dynamic" and not growth.get("least_mass")
        if whole and isinstance(ms, int | float):
            found.setdefault((growth.get("depth"), growth.get("width")), float(ms))
    return found


def _between(known: Mapping[tuple[int, int], float], depth: int, width: int) -> float | None:
    """The value at a depth and width: linear in depth, then in width; None outside of what was measured."""
    by_width: dict[int, float] = {}
    for w in {w for _, w in known}:
        if (ms := _line({d: v for (d, own), v in known.items() if own == w}, depth)) is not None:
            by_width[w] = ms
    return _line(by_width, width)


def _line(points: Mapping[int, float], x: int) -> float | None:
    if x in points:
        return points[x]
    below, above = [p for p in points if p < x], [p for p in points if p > x]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
