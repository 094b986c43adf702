"""What a round costs on this machine, measured once and kept as data: milliseconds of a verification by its rows, of a
drafter's round by growth.

Decisions are made from these numbers, never from clocks while decoding, so that every run can be replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.costs import interpolated as interpolated
from draftsmith.decoding.drawn import Draws
from draftsmith.decoding.growth import DynamicGrowth, Limits
from draftsmith.drafters.base import Drafter
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, Rows
from draftsmith.target.sampling import Sampling, next_tokens

ROWS = (1, 4, 8, 12, 16, 24, 32, 48)


@torch.inference_mode()
def verify_cost(
    target: HFTarget, rows: Sequence[int] = ROWS, context: int = 128, repeats: int = 8, batch: int = 1
) -> dict[int, float]:
    """Milliseconds of one verification pass of so many rows a sequence (root included) of `batch` sequences of
    `context` tokens: median of `repeats`, interleaved."""
    prompt = ((torch.arange(context)[None] * 7 + 11) % target.spec.vocab_size).expand(batch, -1)
    target.prefill(prompt, [context] * batch, FeatureSpec(), context + max(rows) + 1)
    times: dict[int, list[float]] = {n: [] for n in rows}
    for repeat in range(repeats + 1):
        for n in rows:
            chain = Rows(
                ((torch.arange(n)[None] * 5 + 3) % target.spec.vocab_size).expand(batch, -1),
                torch.arange(n).expand(batch, -1),
                torch.ones((n, n), dtype=torch.bool).tril().expand(batch, -1, -1),
            )
            started = time.perf_counter()
            out = target.verify(chain, FeatureSpec())
            assert out.logits is not None
            next_tokens(out.logits, Sampling(), range(batch), chain.depths).tolist()
            if repeat:
                times[n].append((time.perf_counter() - started) * 1e3)
            target.commit(torch.zeros((batch, 1), dtype=torch.int64), [0] * batch)
    return {n: statistics.median(t) for n, t in times.items()}


@torch.inference_mode()
def draft_cost(
    target: HFTarget, composition: Composition, context: int = 128, repeats: int = 8, batch: int = 1
) -> float:
    """Milliseconds that a composition takes for a round of `batch` sequences of `context` tokens: reading two committed
    tokens of each and growing the trees; median of `repeats`."""
    device = target.device
    ids = ((torch.arange(context + 1)[None] * 7 + 11) % target.spec.vocab_size).expand(batch, -1).to(device)
    wants = composition.wants
    hidden = target.read(ids, [context + 1] * batch, wants)
    state = composition.start(batch, context + 64)
    composition.observe(state, ids, {n: hidden[n] for n in wants.names}, [context + 1] * batch)
    draws = Draws(Sampling(temperature=1.0), range(batch), torch.full((batch,), context + 1, device=device))
    ends = torch.tensor(target.spec.eos_ids, device=device)
    limits = Limits(torch.full((batch,), 64, device=device), ends, draws)
    times = []
    for repeat in range(repeats + 2):
        started = time.perf_counter()
        tree = composition.propose(state, limits)
        tree.tokens.tolist()
        composition.observe(state, ids[:, -2:], {n: hidden[n][:, -2:] for n in wants.names}, [2] * batch)
        if repeat > 1:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


@dataclass(frozen=True)
class Grid:
    """What `measured` measures: sequences together, tokens in each, rows a sequence, and shapes of what is drafted."""

    batches: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (128, 512)
    rows: tuple[int, ...] = ROWS
    depths: tuple[int, ...] = (1, 4, 8)
    widths: tuple[int, ...] = (1, 4, 8)

    def steps(self, drafters: int) -> int:
        """How many measurements that is."""
        shapes = len(self.depths) * len(self.widths)
        return len(self.batches) * len(self.contexts) * (1 + drafters * shapes)


def measured(
    target: HFTarget, drafters: Mapping[str, Drafter], grid: Grid, repeats: int = 8, done: Callable[[], object] = int
) -> dict[str, Any]:
    """The costs of verifying and drafting on this machine, as `costs.stored_round_costs` reads them.

    Args:
        drafters: by name; each is measured drafting dynamic trees of all depths and widths.
        done: called after each measurement.

    Returns:
        What they hold for (target, device, dtype, threads), `verify`: `batch`, `context` and `ms` by rows a sequence,
        and `drafting`: `drafter`, `batch`, `context`, `depth`, `width` and `ms`; a JSON object.

    Raises:
        UserError: the target does not take so long a context.
    """
    longest = target.spec.max_positions - max(grid.rows) - 1
    if max(grid.contexts) > longest:
        raise UserError(f"{target.spec.name} takes contexts of up to {longest} tokens here, not {max(grid.contexts)}")
    verify: list[dict[str, Any]] = []
    drafting: list[dict[str, Any]] = []
    for batch in grid.batches:
        for context in grid.contexts:
            place = {"batch": batch, "context": context}
            costs = verify_cost(target, grid.rows, context, repeats, batch)
            verify.append({**place, "ms": {str(rows): ms for rows, ms in costs.items()}})
            done()
            for name, drafter in drafters.items():
                for depth in grid.depths:
                    for width in grid.widths:
                        single = Single(drafter, DynamicGrowth(max(grid.rows) - 1, depth, width))
                        ms = draft_cost(target, single, context, repeats, batch)
                        drafting.append({"drafter": name, **place, "depth": depth, "width": width, "ms": ms})
                        done()
    device = target.device
    return {
        "format": 2,
        "target": {"name": target.spec.name, "fingerprint": target.spec.fingerprint},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": target.spec.dtype,
        "kernels": target.kernels,
        "threads": torch.get_num_threads(),
        "verify": verify,
        "drafting": drafting,
    }
