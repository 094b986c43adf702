"""A head drafting in training as it does in decoding: EAGLE-3's training-time test (2503.01840, §3), which is also
HASS's harmonised context alignment (2408.15766, §3.2).

A draft that starts at p reads the target's state at p; its step k reads the head's own state of step k−1 beside the
embedding of x_{p+1+k}, at rotary position p+k. It attends to the true rows up to p and to its own rows of steps 1…k, so
that the last k keys of every query are drafted and the others the target's. The true rows are the keys of step 0, one
causal mask for all steps; of each later step a query sees one key, so a step adds a column to the scores and not
another `[L, L]` block (the diagonal form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from draftsmith.drafters.head import Head

Pair = tuple[Tensor, Tensor]
Step = tuple[Tensor, Tensor, Tensor]
"""States, and the keys and values of the rows that they were made from."""


@dataclass(frozen=True)
class UnrollBatch:
    """Packed training rows for `unroll`.

    Attributes:
        ids: `[R, L]` int64 tokens; several samples may stand one after another in a row.
        features: `[R, L, F]` the target's features at each position.
        segments: `[R, L]` int64, which sample a position belongs to; −1 for padding.
        positions: `[R, L]` int64, position within the sample.
        starts: `[R, Q]` int64, the positions p (indices into the row) from which drafts are unrolled; padded with any
            index.
        active: `[R, Q]` bool, which of them are real.
    """

    ids: Tensor
    features: Tensor
    segments: Tensor
    positions: Tensor
    starts: Tensor
    active: Tensor


@dataclass(frozen=True)
class StepOut:
    """States `[R, Q, H]` after an unrolled step; the head's `judged` and `output` make logits of them."""

    step: int
    states: Tensor


def unroll(
    head: Head, batch: UnrollBatch, steps: int, detach_steps: bool = False, checkpoint_steps: bool = False
) -> Iterator[StepOut]:
    """Draft `steps` tokens from every start, each step reading the head's own states; equal to `observe` and `expand`
    of a chain, step by step.

    Prompt positions enter as keys and values only: nothing is drafted from them.

    Args:
        detach_steps: no gradient from a step to the one before.
        checkpoint_steps: keep each step's inputs only and compute it again in the backward pass.
    """
    run = _checkpointed if checkpoint_steps else _directly
    starts, width = batch.starts, batch.ids.shape[1]
    head.rotary.reach(int(batch.positions.max()) + steps + 1, batch.ids.device)
    origin = batch.positions.gather(1, starts)
    causal = torch.arange(width, device=starts.device) <= starts[:, :, None]
    same = batch.segments[:, None, :] == batch.segments.gather(1, starts)[:, :, None]
    mask = (causal & same)[:, None]
    states, keys, values = run(_first_step, head, batch, origin, mask)
    yield StepOut(0, states)
    groups = head.options.num_attention_heads // head.options.num_key_value_heads
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    penalty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)
    own: list[Pair] = []
    for step in range(1, steps):
        reads = head.passed_on(states.detach() if detach_steps else states)
        tokens = batch.ids.gather(1, (starts + 1 + step).clamp(max=width - 1))
        states, k, v = run(_later_step, head, reads, tokens, origin + step, (keys, values, penalty), tuple(own))
        own.append((k, v))
        yield StepOut(step, states)


def _first_step(head: Head, batch: UnrollBatch, origin: Tensor, mask: Tensor) -> Step:
    """States after the drafts' first token; keys and values of all rows."""
    following = F.pad(batch.ids[:, 1:], (0, 1))
    features = batch.features
    if not torch.is_autocast_enabled(features.device.type):
        features = features.to(head.dtype)
    states = head.fuse(features)
    x, residual = head.inputs(head.embed(following).to(states.dtype), states)
    keys, values = head.keys_values(x, batch.positions)
    x, residual = _rows(x, batch.starts), _rows(residual, batch.starts)
    q = head.queries(x, origin)
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return head.rest(residual, mixed), keys, values


def _later_step(
    head: Head,
    reads: Tensor,
    tokens: Tensor,
    position: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    own: tuple[Pair, ...],
) -> Step:
    """States after one more drafted token; its own keys and values."""
    groups = head.options.num_attention_heads // head.options.num_key_value_heads
    x, residual = head.inputs(head.embed(tokens).to(reads.dtype), reads)
    q = head.queries(x, position)
    k, v = head.keys_values(x, position)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return head.rest(residual, _attend_with_own(q, shared, (*own, (k, v)))), k, v


def _attend_with_own(q: Tensor, shared: tuple[Tensor, Tensor, Tensor], own: tuple[Pair, ...]) -> Tensor:
    """Attention over shared keys `[R, heads, L, d]` and each query's own keys of the steps so far (the diagonal)."""
    keys, values, penalty = shared
    scale = q.shape[-1] ** -0.5
    true = (q @ keys.transpose(2, 3)).float() * scale + penalty
    diagonal = torch.stack([(q * k).sum(-1) for k, _ in own], dim=-1).float() * scale
    weights = torch.cat([true, diagonal], dim=-1).softmax(dim=-1).to(values.dtype)
    mixed = weights[..., : keys.shape[2]] @ values
    for i, (_, v) in enumerate(own):
        mixed = mixed + weights[..., keys.shape[2] + i, None] * v
    return mixed


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _directly(function: Callable[..., Step], *arguments: Any) -> Step:
    return function(*arguments)


def _checkpointed(function: Callable[..., Step], *arguments: Any) -> Step:
    found: Step = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return found
