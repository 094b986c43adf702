"""What a round costs on this machine, measured once and kept as data: milliseconds of a verification by its rows, of a
drafter's round by growth.

Decisions are made from these numbers, never from clocks while decoding, so that every run can be replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from draftsmith.decoding.composition import Composition
from draftsmith.decoding.drawn import Draws
from draftsmith.decoding.growth import Limits
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec, Rows
from draftsmith.target.sampling import Sampling, next_tokens

ROWS = (1, 4, 8, 12, 16, 24, 32, 48)


@torch.inference_mode()
def verify_cost(target: HFTarget, rows: Sequence[int] = ROWS, context: int = 128, repeats: int = 8) -> dict[int, float]:
    """Milliseconds of one verification pass of so many rows (root included), median of `repeats`, interleaved."""
    prompt = (torch.arange(context)[None] * 7 + 11) % target.spec.vocab_size
    target.prefill(prompt, [context], FeatureSpec(), context + max(rows) + 1)
    times: dict[int, list[float]] = {n: [] for n in rows}
    for repeat in range(repeats + 1):
        for n in rows:
            chain = Rows(
                (torch.arange(n)[None] * 5 + 3) % target.spec.vocab_size,
                torch.arange(n)[None],
                torch.ones((1, n, n), dtype=torch.bool).tril(),
            )
            started = time.perf_counter()
            out = target.verify(chain, FeatureSpec())
            assert out.logits is not None
            next_tokens(out.logits, Sampling(), [0], chain.depths).tolist()
            if repeat:
                times[n].append((time.perf_counter() - started) * 1e3)
            target.commit(torch.zeros((1, 1), dtype=torch.int64), [0])
    return {n: statistics.median(t) for n, t in times.items()}


def interpolated(costs: dict[int, float], rows: int) -> float:
    """Milliseconds for a number of rows between measured ones (linear), beyond the last in proportion."""
    known = sorted(costs)
    if rows <= known[0]:
        return costs[known[0]]
    for low, high in pairwise(known):
        if rows <= high:
            share = (rows - low) / (high - low)
            return costs[low] + share * (costs[high] - costs[low])
    return costs[known[-1]] * rows / known[-1]


@torch.inference_mode()
def draft_cost(target: HFTarget, composition: Composition, context: int = 128, repeats: int = 8) -> float:
    """Milliseconds that a composition takes for a round: reading two committed tokens and growing the trees."""
    device = target.device
    ids = ((torch.arange(context + 1)[None] * 7 + 11) % target.spec.vocab_size).to(device)
    wants = composition.wants
    hidden = target.read(ids, [context + 1], wants)
    state = composition.start(1, context + 64)
    composition.observe(state, ids, {n: hidden[n] for n in wants.names}, [context + 1])
    draws = Draws(Sampling(temperature=1.0), [0], torch.tensor([context + 1], device=device))
    limits = Limits(torch.tensor([64], device=device), torch.tensor(target.spec.eos_ids, device=device), draws)
    times = []
    for repeat in range(repeats + 2):
        started = time.perf_counter()
        tree = composition.propose(state, limits)
        tree.tokens.tolist()
        composition.observe(state, ids[:, -2:], {n: hidden[n][:, -2:] for n in wants.names}, [2])
        if repeat > 1:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
