"""What a drafter can be taught to minimise, per token and never reduced, and the head in bounded blocks.

The divergences share one signature, `loss(teacher_log_p, draft_log_q) -> [N]`:

* `teacher_log_p` `[N, Vd]` is the target's log p over the *draft* vocabulary, `h·W_d − log Z` with the log Z of the
  whole vocabulary: a slice whose mass may be below 1. What is missing is mass that the drafter cannot propose.
* `draft_log_q` `[N, Vd]` is log q, normalised over the draft vocabulary, finite.

The teacher is data: no gradient flows to it. `renormalise=True` divides the slice by its own mass first, as most other
trainers do; by default the mass outside stays lost, so that 1 − TV is the true probability of acceptance.
Computed in the type of the arguments: float32 in training.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import BLOCK_BYTES, overlap, rows_that_fit

Loss = Callable[[Tensor, Tensor], Tensor]
"""(teacher_log_p `[N, Vd]`, draft_log_q `[N, Vd]`) to `[N]`."""

# The few float32 temporaries of one tile should stay in a core's cache: at 4,096 tokens these are 64 rows.
CPU_TILE_BYTES = 1 << 20

STRIDE = 32


def rounded(size: int) -> int:
    """`size` rounded up to a multiple of 32, at least 32.

    Matrix kernels are compiled for each shape they meet and kept: with a few shapes instead of a new one at each step,
    nothing is compiled after the first steps, and a process that has trained stays small and decodes as fast as a
    fresh one (on a CPU with AMX it was 1.5 times as slow with a tree's rows).
    """
    return STRIDE * max(1, -(-size // STRIDE))


def forward_kl(teacher_log_p: Tensor, draft_log_q: Tensor, *, renormalise: bool = False) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q) over the slice; mass outside adds nothing. `[N, Vd]` twice to `[N]`, nats.

    Over a slice of mass μ it is at least μ·log μ, not 0.
    Source: DistillSpec (arXiv 2310.08461) "forward KL"; AdaSPEC (arXiv 2510.19779) eq. 6 to 8.
    """
    log_p = _teacher(teacher_log_p, renormalise)
    return (log_p.exp() * (_finite(log_p) - draft_log_q)).sum(-1)


def soft_cross_entropy(teacher_log_p: Tensor, draft_log_q: Tensor, *, renormalise: bool = False) -> Tensor:
    """−Σ p·log q over the slice: forward KL and the teacher's entropy, with the same gradient. `[N]`, nats.

    Source: EAGLE (arXiv 2401.15077) classification loss; EAGLE-3 (arXiv 2503.01840) token loss.
    """
    return -(_teacher(teacher_log_p, renormalise).exp() * draft_log_q).sum(-1)


def reverse_kl(teacher_log_p: Tensor, draft_log_q: Tensor, *, renormalise: bool = False) -> Tensor:
    """KL(q‖p) = Σ q·(log q − log p) over the slice, where all of q is; p must be positive there. `[N]`, nats.

    Without renormalising it is at least −log μ, μ the slice's mass. Source: DistillSpec "reverse KL".
    """
    log_p = _teacher(teacher_log_p, renormalise)
    return (draft_log_q.exp() * (draft_log_q - log_p)).sum(-1)


def jsd(teacher_log_p: Tensor, draft_log_q: Tensor, *, beta: float = 0.5, renormalise: bool = False) -> Tensor:
    """Generalised Jensen-Shannon divergence over the whole vocabulary, the lost mass included. `[N]`, nats.

    JSD_β = β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q. Outside the slice q = 0 and m = β·p, so the lost mass
    ℓ = 1 − Σ p adds β·ℓ·log(1/β): with the slice alone, the divergence over the whole vocabulary is exact.
    Source: DistillSpec "JSD[β]"; Agarwal et al. 2023 (arXiv 2306.13649) eq. 1.

    Raises:
        UserError: β is not strictly between 0 and 1.
    """
    if not 0.0 < beta < 1.0:
        raise UserError(
            f"jsd: beta must lie strictly between 0 and 1, not {beta}; 0 and 1 are reverse-kl and forward-kl"
        )
    log_p = _teacher(teacher_log_p, renormalise)
    p, q = log_p.exp(), draft_log_q.exp()
    log_m = (beta * p + (1.0 - beta) * q).clamp_min(torch.finfo(p.dtype).tiny).log()
    inside = beta * p * (_finite(log_p) - log_m) + (1.0 - beta) * q * (draft_log_q - log_m)
    lost = (1.0 - p.sum(-1)).clamp_min(0.0)
    return inside.sum(-1) - beta * math.log(beta) * lost


def total_variation(teacher_log_p: Tensor, draft_log_q: Tensor, *, renormalise: bool = False) -> Tensor:
    """TV = 1 − Σ min(p, q) = 1 − the probability of acceptance; mass outside the slice is lost overlap. `[N]`.

    Source: DistillSpec "TVD"; SFDD eq. 1.
    """
    return 1.0 - overlap(_teacher(teacher_log_p, renormalise), draft_log_q)


def lk_hybrid(teacher_log_p: Tensor, draft_log_q: Tensor, *, eta: float = 3.0, renormalise: bool = False) -> Tensor:
    """λ·KL(p‖q) + (1 − λ)·(1 − α), α = Σ min(p, q), λ = exp(−η·α) without gradient. `[N]`.

    KL where the drafter is far off (TV's gradient is weak there), acceptance itself where it is near. λ is each token's
    own; `renormalise` concerns the KL term, α always counts the mass outside as lost.
    Source: LK losses (arXiv 2602.23881), hybrid; η = 3 is SpecForge's default (it takes λ from the batch's mean α).

    Raises:
        UserError: η is negative.
    """
    if eta < 0.0:
        raise UserError(f"lk: eta must not be negative, not {eta}")
    acceptance = overlap(teacher_log_p.detach(), draft_log_q)
    share = torch.exp(-eta * acceptance.detach())
    divergence = forward_kl(teacher_log_p, draft_log_q, renormalise=renormalise)
    return share * divergence + (1.0 - share) * (1.0 - acceptance)


def top_k_distillation(teacher_log_p: Tensor, draft_log_q: Tensor, *, k: int = 10, renormalise: bool = False) -> Tensor:
    """−Σ_{x ∈ top-K(p)} p(x)·log q(x), p not renormalised over the K. `[N]`, nats.

    Source: HASS (arXiv 2408.15766) harmonised objective distillation, K = 10.

    Raises:
        UserError: K is below 1.
    """
    if k < 1:
        raise UserError(f"top-k: k must be at least 1, not {k}")
    log_p, tokens = _teacher(teacher_log_p, renormalise).topk(min(k, teacher_log_p.shape[-1]), dim=-1)
    return -(log_p.exp() * draft_log_q.gather(-1, tokens)).sum(-1)


def smooth_l1(features: Tensor, target_features: Tensor, *, beta: float = 1.0) -> Tensor:
    """SmoothL1 between drafted and true features, mean over the features. `[N, H]` twice to `[N]`.

    Quadratic below `beta`, linear above. Source: EAGLE regression loss.
    """
    return smooth_l1_loss(features, target_features.detach(), reduction="none", beta=beta).mean(-1)


_BY_NAME: dict[str, Callable[..., Tensor]] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jsd,
    "tv": total_variation,
    "lk": lk_hybrid,
    "soft-ce": soft_cross_entropy,
    "top-k": top_k_distillation,
}

NAMES = tuple(_BY_NAME)
"""The losses that `by_name` knows."""


def by_name(name: str, **options: float | int | bool) -> Loss:
    """A loss by its name, with its options bound: `by_name("jsd", beta=0.3)`.

    Raises:
        UserError: no such loss, no such option of it, or a value out of range; the text names what there is.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"no loss is called {name!r}{hint} There are {', '.join(NAMES)}")
    function = _BY_NAME[name]
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UserError(f"the loss {name!r} has no option {option!r}; it has {', '.join(known)}")
    loss = functools.partial(function, **options)
    loss(torch.zeros(1, 1), torch.zeros(1, 1))  # a value out of range shows here, not at the first step
    return loss


def rows_in_blocks(function: Callable[..., Tensor], *rows: Tensor, block_rows: int) -> Tensor:
    """`function(*rows)` of tensors that share their first axis, evaluated `block_rows` rows at a time.

    What a block computes is dropped and computed again in the backward pass, so that one block is alive at a time. For
    a drafter's head, `chunked_head_loss` is faster.

    Args:
        function: takes as many `[n, …]` tensors as there are `rows`, returns `[n, …]`; row by row independent.
        rows: `[N, …]` each.
        block_rows: rows in a block.
    """
    blocks = []
    for start in range(0, max(1, rows[0].shape[0]), block_rows):
        parts = [tensor[start : start + block_rows] for tensor in rows]
        if torch.is_grad_enabled():
            blocks.append(checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(function(*parts))
    return torch.cat(blocks)


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    log_z: Tensor,
    loss: Loss,
    block_rows: int | None = None,
) -> Tensor:
    """`loss(teacher_hidden·teacher_weightᵀ − log_z, log_softmax(hidden·weightᵀ))` without all rows' float32 logits.

    The same values and gradients as the direct form. Logits are multiplied out in blocks and turned into losses in
    cache-sized float32 tiles. Where all rows fit into one block, the loss's gradient with respect to the logits is
    computed on the way and kept in their place and type (bfloat16 under autocast), so that the backward pass is two
    multiplications; else the backward pass computes each block again, and memory does not grow with N.

    Args:
        hidden: `[N, H]`, the drafter's last hidden state; gets a gradient.
        weight: `[Vd, H]`, the drafter's head; gets a gradient where it wants one. Both are multiplied in autocast's
            type where that is on.
        teacher_hidden: `[N, Ht]`, the target's last hidden state.
        teacher_weight: `[Vd, Ht]`, the target's `lm_head` rows of the draft vocabulary; multiplied in the teacher's own
            type, the one that `log_z` was computed in.
        log_z: `[N]` float32, the target's log Z over its whole vocabulary.
        loss: see `Loss`, row by row independent.
        block_rows: rows in a block; by default what 64 MiB of float32 hold.

    Returns:
        `[N]` float32 (float64 where `hidden` is).
    """
    n_rows = hidden.shape[0]
    surplus = rounded(n_rows) - n_rows
    if surplus:
        # Rows of zeros, whose teacher and drafter are both uniform.
        hidden, teacher_hidden = pad(hidden, (0, 0, 0, surplus)), pad(teacher_hidden, (0, 0, 0, surplus))
        log_z = pad(log_z, (0, surplus), value=math.log(weight.shape[0]))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    block_rows = block_rows or rows_that_fit(BLOCK_BYTES, weight.shape[0])
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        teacher = (teacher_hidden.detach(), teacher_weight.detach(), log_z.detach())
        plan = (loss, dtype, block_rows, wants_gradient)
        values: Tensor = _HeadLoss.apply(hidden, weight, *teacher, *plan)  # type: ignore[no-untyped-call]
    return values[:n_rows] if surplus else values


class _HeadLoss(torch.autograd.Function):
    """`chunked_head_loss`, with rows' own gradients: row i of `∂loss/∂logits` times the incoming gradient of row i."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        log_z: Tensor,
        loss: Loss,
        dtype: torch.dtype,
        block_rows: int,
        wants_gradient: bool,
    ) -> Tensor:
        n_rows = hidden.shape[0]
        narrow, narrow_weight = hidden.to(dtype), weight.to(dtype)
        values = hidden.new_empty(n_rows, dtype=torch.promote_types(dtype, torch.float32))
        keeps = wants_gradient and n_rows <= block_rows
        gradients = narrow.new_empty(0)
        ones = torch.ones_like(values) if keeps else None
        for start in range(0, n_rows, block_rows):
            rows = slice(start, start + block_rows)
            teacher_logits = teacher_hidden[rows] @ teacher_weight.T
            gradients = narrow[rows] @ narrow_weight.T
            values[rows] = _tiled(gradients, teacher_logits, log_z[rows], loss, ones)
        kept = gradients if keeps else narrow.new_empty(0)
        ctx.save_for_backward(narrow, narrow_weight, teacher_hidden, teacher_weight, log_z, kept)
        ctx.plan = (loss, block_rows, keeps, hidden.dtype, weight.dtype)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, log_z, kept = ctx.saved_tensors
        loss, block_rows, keeps, hidden_dtype, weight_dtype = ctx.plan
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = incoming.dtype
        nothing = (None,) * 7
        if keeps:
            # ∂loss/∂logits was taken for an incoming gradient of 1: what came in scales its rows
            scale = incoming.unsqueeze(-1)
            to_hidden = (kept @ weight).to(wide).mul_(scale) if wants_hidden else None
            to_weight = kept.T @ (hidden * scale).to(hidden.dtype) if wants_weight else None
            return _cast(to_hidden, hidden_dtype), _cast(to_weight, weight_dtype), *nothing
        to_hidden = hidden.new_empty(hidden.shape, dtype=hidden_dtype) if wants_hidden else None
        to_weight = weight.new_zeros(weight.shape, dtype=wide) if wants_weight else None
        for start in range(0, hidden.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            teacher_logits = teacher_hidden[rows] @ teacher_weight.T
            gradients = hidden[rows] @ weight.T
            _tiled(gradients, teacher_logits, log_z[rows], loss, incoming[rows])
            if to_hidden is not None:
                to_hidden[rows] = gradients @ weight
            if to_weight is not None:
                to_weight += gradients.T @ hidden[rows]
        return to_hidden, _cast(to_weight, weight_dtype), *nothing


def _tiled(logits: Tensor, teacher_logits: Tensor, log_z: Tensor, loss: Loss, incoming: Tensor | None) -> Tensor:
    """The losses `[n]` of one block; with `incoming` `[n]`, `logits` `[n, Vd]` is overwritten with its gradient.

    `teacher_logits` `[n, Vd]` is scratch.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    n_rows = logits.shape[0]
    tile = rows_that_fit(CPU_TILE_BYTES, logits.shape[1]) if logits.device.type == "cpu" else max(1, n_rows)
    values = log_z.new_empty(n_rows, dtype=wide)
    for start in range(0, n_rows, tile):
        rows = slice(start, min(start + tile, n_rows))
        log_p = teacher_logits[rows].to(wide).sub_(log_z[rows].unsqueeze(-1))
        if incoming is None:
            with torch.no_grad():
                values[rows] = loss(log_p, logits[rows].to(wide).log_softmax(-1))
            continue
        with torch.enable_grad():
            leaf = logits[rows].to(wide, copy=True).requires_grad_()
            losses = loss(log_p, leaf.log_softmax(-1))
            (gradient,) = torch.autograd.grad(losses, leaf, incoming[rows])
        logits[rows] = gradient
        values[rows] = losses.detach()
    return values


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _teacher(teacher_log_p: Tensor, renormalise: bool) -> Tensor:
    """The teacher's log p without gradient, over its own mass where asked."""
    log_p = teacher_log_p.detach()
    return log_p - log_p.logsumexp(-1, keepdim=True) if renormalise else log_p


def _finite(log_p: Tensor) -> Tensor:
    """log p with −∞ (p = 0) made finite, so that p·log p is 0 there and not NaN."""
    return log_p.clamp_min(torch.finfo(log_p.dtype).min)
