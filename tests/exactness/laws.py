"""Distributions written out by hand."""

from __future__ import annotations

import itertools
import math

from draftsmith.target.sampling import Sampling


def law_by_hand(logits: list[float], context: list[int], s: Sampling) -> list[float]:
    """`generate`'s distribution after `context`: penalty, n-grams, suppression, temperature, top-k, top-p, min-p."""
    z = list(logits)
    for token in set(context):
        z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
    n = s.no_repeat_ngram_size
    for token in range(len(z)):
        grams = [tuple(context[i : i + n]) for i in range(len(context) - n + 1)] if n else []
        if token in s.suppress_tokens or (n and (*context[len(context) - n + 1 :], token) in grams):
            z[token] = -math.inf
    z = [x / s.temperature for x in z]
    if s.top_k:
        smallest = sorted(z, reverse=True)[s.top_k - 1]
        z = [x if x >= smallest else -math.inf for x in z]
    p = softmax(z)
    if s.top_p < 1:
        order = sorted(range(len(z)), key=lambda i: -p[i])
        mass = list(itertools.accumulate(p[i] for i in order))
        dropped = {i for rank, i in enumerate(order) if rank and mass[rank - 1] >= s.top_p}
        p = softmax([-math.inf if i in dropped else x for i, x in enumerate(z)])
    if s.min_p:
        p = [x if x >= s.min_p * max(p) else 0.0 for x in p]
    return [x / sum(p) for x in p]


def softmax(z: list[float]) -> list[float]:
    weights = [math.exp(x - max(z)) for x in z]
    return [w / math.fsum(weights) for w in weights]
