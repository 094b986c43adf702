"""Losses against naive float64 formulas, gradients against finite differences, the blocked head against the plain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.numerics.losses import NAMES, Loss, by_name, chunked_head_loss, rows_in_blocks, smooth_l1

Array = npt.NDArray[np.float64]
VOCAB, SLICE = 12, 8


def pair(rows: int = 5, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor, Array, Array]:
    """Teacher log p over the first 8 of 12 tokens, draft logits over these 8, and both as probabilities of all 12."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64) * scale
    draft = torch.randn(rows, SLICE, generator=generator, dtype=torch.float64) * scale
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(-1, keepdims=True)
    q = np.zeros_like(p)
    q[:, :SLICE] = np.exp(draft.numpy()) / np.exp(draft.numpy()).sum(-1, keepdims=True)
    return z[:, :SLICE] - z.logsumexp(-1, keepdim=True), draft, p, q


def kl(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        value: Array = np.where(a > 0, a * np.log(a / b), 0.0).sum(-1)
    return value


def naive(name: str, p: Array, q: Array) -> Array:
    """The loss from its definition, p and q over all 12 tokens (q is 0 on the last 4)."""
    inside_p, inside_q = p[:, :SLICE], q[:, :SLICE]
    accepted: Array = np.minimum(p, q).sum(-1)
    if name == "forward-kl":
        return kl(inside_p, inside_q)
    if name == "reverse-kl":
        return kl(q, p)
    if name == "jsd":
        middle = 0.5 * (p + q)
        return 0.5 * kl(p, middle) + 0.5 * kl(q, middle)
    if name == "tv":
        distance: Array = 0.5 * np.abs(p - q).sum(-1)
        return distance
    if name == "lk":
        share = np.exp(-3.0 * accepted)
        mixed: Array = share * kl(inside_p, inside_q) + (1 - share) * (1 - accepted)
        return mixed
    if name == "soft-ce":
        crossed: Array = -(inside_p * np.log(inside_q)).sum(-1)
        return crossed
    best = np.argsort(-inside_p, axis=-1)[:, :3]
    top: Array = -np.take_along_axis(inside_p * np.log(inside_q), best, -1).sum(-1)
    return top


OPTIONS: dict[str, dict[str, int]] = {"top-k": {"k": 3}}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.05, 6.0))
def test_values_are_the_naive_ones_with_the_lost_mass(name: str, seed: int, scale: float) -> None:
    log_p, draft, p, q = pair(seed=seed, scale=scale)
    assert p[:, SLICE:].sum() > 0
    got = by_name(name, **OPTIONS.get(name, {}))(log_p, draft.log_softmax(-1))
    assert got.shape == (5,)
    np.testing.assert_allclose(got.numpy(), naive(name, p, q), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_over_the_slice_is_the_divergence_over_the_whole_vocabulary(beta: float) -> None:
    log_p, draft, p, q = pair(seed=3)
    middle = beta * p + (1 - beta) * q
    want = beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    np.testing.assert_allclose(by_name("jsd", beta=beta)(log_p, draft.log_softmax(-1)).numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lk"])
def test_renormalised_is_the_loss_of_the_renormalised_slice(name: str) -> None:
    log_p, draft, p, q = pair(seed=4)
    inside = np.zeros_like(p)
    inside[:, :SLICE] = p[:, :SLICE] / p[:, :SLICE].sum(-1, keepdims=True)
    got = by_name(name, renormalise=True, **OPTIONS.get(name, {}))(log_p, draft.log_softmax(-1))
    if name == "reverse-kl":
        want = kl(q[:, :SLICE], inside[:, :SLICE])
    else:
        want = naive(name, inside, q)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_lk_renormalises_its_divergence_and_still_counts_lost_mass_as_rejected() -> None:
    log_p, draft, p, q = pair(seed=5)
    inside = p[:, :SLICE] / p[:, :SLICE].sum(-1, keepdims=True)
    accepted = np.minimum(p, q).sum(-1)
    share = np.exp(-1.5 * accepted)
    want = share * kl(inside, q[:, :SLICE]) + (1 - share) * (1 - accepted)
    got = by_name("lk", eta=1.5, renormalise=True)(log_p, draft.log_softmax(-1))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lk"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, renormalise: bool) -> None:
    log_p, draft, _, _ = pair(rows=3, seed=6)
    loss = by_name(name, renormalise=renormalise, **OPTIONS.get(name, {}))
    assert torch.autograd.gradcheck(lambda z: loss(log_p, z.log_softmax(-1)), (draft.requires_grad_(),))


def test_the_gradient_of_lk_holds_its_share_fixed() -> None:
    log_p, draft, _, _ = pair(rows=3, seed=7)
    draft.requires_grad_()
    with torch.no_grad():
        share = torch.exp(-3.0 * (1 - by_name("tv")(log_p, draft.log_softmax(-1))))

    def at_fixed_share(z: Tensor) -> Tensor:
        log_q = z.log_softmax(-1)
        return share * by_name("forward-kl")(log_p, log_q) + (1 - share) * by_name("tv")(log_p, log_q)

    assert torch.autograd.gradcheck(at_fixed_share, (draft,))
    (got,) = torch.autograd.grad(by_name("lk")(log_p, draft.log_softmax(-1)).sum(), draft)
    (want,) = torch.autograd.grad(at_fixed_share(draft).sum(), draft)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_descent_lifts_the_token_that_the_drafter_underrates(name: str) -> None:
    log_p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    draft = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().requires_grad_()
    loss = by_name(name)
    (gradient,) = torch.autograd.grad(loss(log_p, draft.log_softmax(-1)).sum(), draft)
    assert gradient[0, 0] < 0
    assert gradient[0, 1] > 0
    with torch.no_grad():
        nearer = loss(log_p, (draft - 0.1 * gradient).log_softmax(-1))
        assert nearer.item() < loss(log_p, draft.log_softmax(-1)).item()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    log_p, draft, _, _ = pair(rows=2)
    log_p.requires_grad_()
    draft.requires_grad_()
    by_name(name)(log_p, draft.log_softmax(-1)).sum().backward()
    assert log_p.grad is None
    assert draft.grad is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reverse-kl"])
def test_a_token_that_the_target_rules_out_makes_no_nan(name: str) -> None:
    log_p = torch.tensor([[0.6, 0.4, 0.0]]).log()
    draft = torch.zeros(1, 3, requires_grad=True)
    value = by_name(name)(log_p, draft.log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert draft.grad is not None
    assert draft.grad.isfinite().all()


def test_the_best_drafter_over_a_slice_has_the_stated_least_losses() -> None:
    mass = 0.75
    best = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    log_p, log_q = (mass * best).log(), best.log()
    least = {"forward-kl": mass * math.log(mass), "reverse-kl": -math.log(mass), "tv": 1 - mass}
    for name, want in least.items():
        assert by_name(name)(log_p, log_q).item() == pytest.approx(want)
        (gradient,) = torch.autograd.grad(
            by_name(name)(log_p, (z := log_q.clone().requires_grad_()).log_softmax(-1)), z
        )
        if name != "tv":  # TV has a kink there
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_smooth_l1_is_quadratic_near_and_linear_far_and_averages_features() -> None:
    drafted = torch.tensor([[0.5, 3.0], [0.0, -1.0]], requires_grad=True)
    loss = smooth_l1(drafted, torch.zeros(2, 2))
    torch.testing.assert_close(loss, torch.tensor([(0.125 + 2.5) / 2, (0.0 + 0.5) / 2]))
    (gradient,) = torch.autograd.grad(loss.sum(), drafted)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, 0.5], [0.0, -0.5]]))


def test_wrong_names_and_options_are_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no loss is called 'foward-kl'; did you mean 'forward-kl'"):
        by_name("foward-kl")
    with pytest.raises(UserError, match=r"'jsd' has no option 'eta'; it has beta, renormalise"):
        by_name("jsd", eta=1.0)
    for name, option, value in (("jsd", "beta", 1.0), ("jsd", "beta", -0.1), ("lk", "eta", -1.0), ("top-k", "k", 0)):
        with pytest.raises(UserError, match=rf"{name}: {option} must"):
            by_name(name, **{option: value})


def head(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    teacher_hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    whole = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    tensors = {
        "hidden": torch.randn(rows, 4, generator=generator, dtype=torch.float64),
        "weight": torch.randn(20, 4, generator=generator, dtype=torch.float64),
        "teacher_hidden": teacher_hidden,
        "teacher_weight": whole[:20],
        "log_z": (teacher_hidden @ whole.T).logsumexp(-1),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def direct(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, log_z: Tensor, loss: Loss
) -> Tensor:
    log_p = (teacher_hidden @ teacher_weight.T).to(log_z.dtype) - log_z[:, None]
    return loss(log_p, (hidden @ weight.T).to(log_z.dtype).log_softmax(-1))


blocked: Callable[..., Tensor] = chunked_head_loss


def with_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], row_weights: Tensor, **options: object
) -> list[Tensor]:
    leaves = {name: tensor.clone().requires_grad_(name in ("hidden", "weight")) for name, tensor in tensors.items()}
    values = function(**leaves, **options)
    (values * row_weights).sum().backward()
    gradients = [leaves[name].grad for name in ("hidden", "weight")]
    assert all(gradient is not None for gradient in gradients)
    return [values.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_rows", [None, 1, 7, 23, 24])
def test_the_blocked_head_equals_the_direct_form(
    name: str, block_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftsmith.numerics.losses.CPU_TILE_BYTES", 20 * 4 * 5)  # tiles of 5 rows
    tensors, loss = head(23), by_name(name)
    row_weights = torch.linspace(-1.0, 2.0, 23, dtype=torch.float64)
    want = with_gradients(direct, tensors, row_weights, loss=loss)
    got = with_gradients(blocked, tensors, row_weights, loss=loss, block_rows=block_rows)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block_rows", [None, 7])
def test_the_blocked_head_in_float32_is_right_to_one_in_a_million(block_rows: int | None) -> None:
    loss = by_name("forward-kl")
    row_weights = torch.full((40,), 1 / 40)
    tensors = head(40, torch.float32)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    want = with_gradients(direct, wide, row_weights.double(), loss=loss)
    got = with_gradients(blocked, tensors, row_weights, loss=loss, block_rows=block_rows)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("block_rows", [None, 7])
def test_under_autocast_the_head_is_multiplied_in_bfloat16_and_gradients_stay_float32(block_rows: int | None) -> None:
    tensors, loss = head(40, torch.float32), by_name("forward-kl")
    row_weights = torch.linspace(0.5, 1.0, 40)
    exact = with_gradients(direct, tensors, row_weights, loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(blocked, tensors, row_weights, loss=loss, block_rows=block_rows)
    rounded = (tensors["hidden"].bfloat16() @ tensors["weight"].bfloat16().T).float().log_softmax(-1)
    log_p = tensors["teacher_hidden"] @ tensors["teacher_weight"].T - tensors["log_z"][:, None]
    torch.testing.assert_close(got[0], loss(log_p, rounded))  # the teacher is not rounded
    for one, other in zip(got[1:], exact[1:], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() / other.norm() < 0.02


def test_a_frozen_head_and_a_head_without_gradient() -> None:
    tensors, loss = head(9), by_name("jsd")
    want = direct(**tensors, loss=loss)
    for block_rows in (4, 9):
        hidden = tensors["hidden"].clone().requires_grad_()
        values = blocked(**{**tensors, "hidden": hidden}, loss=loss, block_rows=block_rows)
        values.sum().backward()
        assert hidden.grad is not None
        assert tensors["weight"].grad is None
        with torch.no_grad():
            quiet = blocked(**{**tensors, "hidden": hidden}, loss=loss, block_rows=block_rows)
        assert not quiet.requires_grad
        for got in (values.detach(), quiet):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    empty = blocked(**head(0), loss=loss)
    assert empty.shape == (0,)


def test_more_than_one_block_keeps_no_logits_for_the_backward_pass() -> None:
    tensors = head(32)
    tensors["hidden"].requires_grad_()
    for block_rows, logits in ((32, 1), (8, 0)):
        values = blocked(**tensors, loss=by_name("forward-kl"), block_rows=block_rows)
        kept = [tuple(tensor.shape) for tensor in getattr(values.grad_fn, "saved_tensors", ())]
        assert len(kept) == 6
        assert kept.count((32, 20)) == logits
        assert sum(shape[-1] == 20 and len(shape) == 2 for shape in kept) == logits


def test_rows_in_blocks_sees_one_block_at_a_time_and_changes_nothing() -> None:
    tensors, loss = head(23), by_name("reverse-kl")
    seen: list[int] = []

    def one_block(hidden: Tensor, teacher_hidden: Tensor, log_z: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return direct(hidden, weight, teacher_hidden, tensors["teacher_weight"], log_z, loss)

    weight = tensors["weight"].clone().requires_grad_()
    rows = (tensors["hidden"].clone().requires_grad_(), tensors["teacher_hidden"], tensors["log_z"])
    values = rows_in_blocks(one_block, *rows, block_rows=5)
    assert seen == [5, 5, 5, 5, 3]
    values.sum().backward()
    assert sorted(seen) == sorted([5, 5, 5, 5, 3] * 2)
    want = with_gradients(direct, tensors, torch.ones(23, dtype=torch.float64), loss=loss)
    for got, other in zip((values.detach(), rows[0].grad, weight.grad), want, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        seen.clear()
        torch.testing.assert_close(rows_in_blocks(one_block, *rows, block_rows=100), want[0])
        assert seen == [23]
