"""Heads drafting in each of their ways, for the tests that compare those."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.drafters.base import Frontier
from draftsmith.drafters.head import Head, HeadState
from draftsmith.drafters.unrolled import UnrollBatch
from tests.tiny import VOCAB

TREE = [(-1, -1, -1), (0, 0, 2), (1, 0, 1, 2)]


def width_of(head: Head) -> int:
    """Width of the features that a head reads."""
    return len(head.wants.names) * head.options.hidden_size


def text(length: int, seed: int, head: Head) -> tuple[Tensor, Tensor]:
    """Random tokens `[length]` and features `[length, F]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (length,), generator=generator)
    return ids, torch.randn(length, width_of(head), generator=generator)


def observed(head: Head, ids: Tensor, features: Tensor) -> tuple[HeadState, Tensor]:
    """A state that has read `ids`, each with the features of the position before it."""
    state = head.start(1, 8)
    shifted = F.pad(features[:-1], (0, 0, 1, 0))
    return state, head.observe(state, ids[None], shifted[None], [len(ids)]).log_q[0, 0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


def packed(head: Head, lengths: list[list[int]], steps: int) -> tuple[UnrollBatch, dict[tuple[int, int], Any]]:
    """Rows of several texts, padding behind; drafts start wherever `steps` tokens follow, not in order."""
    width = max(map(sum, lengths)) + 2
    rows = len(lengths)
    ids = torch.full((rows, width), 3)
    features = torch.randn(rows, width, width_of(head), generator=torch.Generator().manual_seed(9))
    segments = torch.full((rows, width), -1)
    positions = torch.zeros((rows, width), dtype=torch.int64)
    begun: list[list[int]] = []
    texts: dict[tuple[int, int], Any] = {}
    for r, sizes in enumerate(lengths):
        begins: list[int] = []
        at = 0
        for s, size in enumerate(sizes):
            own_ids, own_features = text(size, 100 * r + s, head)
            ids[r, at : at + size], features[r, at : at + size] = own_ids, own_features
            segments[r, at : at + size] = s
            positions[r, at : at + size] = torch.arange(size)
            for p in range(size - steps - 1, -1, -1):
                texts[r, len(begins)] = (own_ids, own_features, p)
                begins.append(at + p)
            at += size
        begun.append(begins)
    queries = max(map(len, begun)) + 1
    starts = torch.tensor([b + [width - 1] * (queries - len(b)) for b in begun])
    active = torch.tensor([[True] * len(b) + [False] * (queries - len(b)) for b in begun])
    return UnrollBatch(ids, features, segments, positions, starts, active), texts


def grown(head: Head, state: HeadState, tokens: list[Tensor], parents: list[tuple[int, ...]]) -> list[Tensor]:
    """Expand level by level; `parents` are places within the level above, −1 the root. log q `[B, W, Vd]` of each."""
    out = []
    before = offset = 0
    for depth, (level, above) in enumerate(zip(tokens, parents, strict=True), start=1):
        slots = torch.tensor([p if p < 0 else p + before for p in above]).expand(level.shape[0], -1)
        out.append(head.expand(state, Frontier(level, slots, depth)).log_q)
        before, offset = offset, offset + level.shape[1]
    return out


def unrolling_equals_decoding(
    head: Head,
    batch: UnrollBatch,
    texts: dict[tuple[int, int], Any],
    steps: int,
    tolerance: float = 1e-5,
    **options: bool,
) -> None:
    """At every start and step of `packed`: what is trained is what decodes."""
    outs = list(head.unroll(batch, steps, **options))
    assert [o.step for o in outs] == list(range(steps))
    drafted = [head.log_q(o.states) for o in outs]
    assert all(bool(d.isfinite().all()) for d in drafted)
    assert len(texts) == int(batch.active.sum())
    for (row, query), (ids, features, p) in texts.items():
        state, log_q = observed(head, ids[: p + 2], features[: p + 2])
        close(drafted[0][row, query], log_q, tolerance)
        for step in range(1, steps):
            token = ids[None, p + 1 + step : p + 2 + step]
            log_q = head.expand(state, Frontier(token, torch.tensor([[step - 2]]), step)).log_q[0, 0]
            close(drafted[step][row, query], log_q, tolerance)
