"""Equality checks: what counts as a near tie, what doesn't, and that wrong texts are found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.tiny import END, VOCAB, prompts, tiny_target
from torch import Tensor

from draftsmith.decoding.engine import Engine
from draftsmith.evaluation.equality import Equality, check, lossless, teacher_forced
from draftsmith.evaluation.summary import Lossless
from draftsmith.foundation import seeding
from draftsmith.target.sampling import Sampling

NEW = 70  # more than one block of rows


@dataclass
class Table:
    """A target whose logits at position t are `rows[t]`, whatever it reads."""

    rows: Tensor
    dtype: torch.dtype = torch.float32

    def read(self, ids: Tensor, lengths: list[int], want: object) -> dict[str, Tensor]:
        assert ids.shape == (1, lengths[0])
        return {"final": self.rows[None, : lengths[0]]}

    def project(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype)


def table(values: dict[int, float], dtype: torch.dtype = torch.float32) -> Any:
    rows = torch.full((4, 8), -1.0)
    for token, value in values.items():
        rows[2, token] = value  # the row that the answer's second token comes from, after a prompt of two
    return Table(rows, dtype)


def compare(target: Any, a: int, b: int, sampling: Sampling | None = None) -> Equality:
    return check(target, [1, 2], [3, a, 5], [3, b, 6], sampling or Sampling(), "r")


def test_equal_texts_need_no_target() -> None:
    assert check(None, [1], [2, 3], [2, 3], Sampling(), 0) == Equality(True, None, False, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("gap", "near"), [(0.5e-4, True), (0.9e-4, True), (1.1e-4, False), (0.3, False)])
def test_float32_near_ties_are_closer_than_1e_4(gap: float, near: bool) -> None:
    found = compare(table({4: 1.0, 6: 1.0 - gap}), 4, 6)
    assert (found.equal, found.first_difference, found.near_tie) == (False, 1, near)
    assert found.gap == pytest.approx(gap, abs=1e-6)


def test_two_close_tokens_far_below_the_maximum_are_no_tie() -> None:
    found = compare(table({4: 1.0, 6: 1.0, 7: 2.0}), 4, 6)
    assert not found.near_tie
    assert found.gap == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtype", "values", "near"),
    [
        (torch.bfloat16, {4: 20.0, 6: 19.5}, True),  # in [16, 32) a bfloat16 has units of 1/8
        (torch.bfloat16, {4: 20.0, 6: 19.375}, False),
        (torch.bfloat16, {4: 20.0, 6: 19.0, 7: -40.0}, True),  # the row's largest |logit| says how large an ulp is
        (torch.bfloat16, {4: 20.0, 6: 18.75, 7: -40.0}, False),
        (torch.bfloat16, {4: 15.0, 6: 14.75}, True),
        (torch.bfloat16, {4: 15.0, 6: 14.625}, False),
        (torch.float16, {4: 20.0, 6: 20.0 - 4 / 64}, True),
        (torch.float16, {4: 20.0, 6: 20.0 - 5 / 64}, False),
    ],
)
def test_half_precision_near_ties_are_within_4_ulp(dtype: torch.dtype, values: dict[int, float], near: bool) -> None:
    assert compare(table(values, dtype), 4, 6).near_tie is near


@pytest.mark.parametrize(("share", "near"), [(0.99, True), (1.01, False)])
def test_at_a_temperature_noise_is_added_and_the_tolerance_divided(share: float, near: bool) -> None:
    # position 3 of request "r": scores are logits / T plus that place's Gumbel noise
    sampling = Sampling(temperature=0.25, seed=9)
    keys = seeding.position_keys(9, ["r"], torch.tensor([[3]]), "token")
    noise = [-math.log(-math.log(u)) for u in seeding.uniform(keys, 8)[0, 0].tolist()]
    scale = 4 * 0.125 / 0.25  # 4 ulp in [16, 32), divided by T
    wanted = 0.25 * (noise[4] - noise[6] - share * scale)  # how far token 6's logit must stand from token 4's
    rows = torch.full((4, 8), -100.0, dtype=torch.float64)
    rows[2, 4], rows[2, 6], rows[2, 0] = 20.0, 20.0 + wanted, -20.0
    target = Table(rows)
    target.project = lambda hidden: hidden.clamp(min=-30)  # type: ignore[method-assign]
    target.dtype = torch.bfloat16  # the scores stay exact here: only the tolerance is the number format's
    found = compare(target, 4, 6, sampling)
    assert found.gap == pytest.approx(share * scale, rel=1e-6)
    assert found.near_tie is near


def test_a_text_that_just_ends_is_no_tie() -> None:
    found = check(None, [1], [2, 3], [2], Sampling(), 0)  # type: ignore[arg-type]
    assert found == Equality(False, 1, False, math.inf)
    assert found.to_row() == {"equal": False, "first_difference": 1, "near_tie": False, "gap": None}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.9, seed=4),
        Sampling(temperature=1.2, top_p=0.8, repetition_penalty=1.3, seed=2),
        Sampling(repetition_penalty=1.5),
    ],
    ids=["greedy", "sampled", "sampled-processed", "greedy-processed"],
)
def test_what_the_target_wrote_is_its_own_and_nothing_else_is(sampling: Sampling) -> None:
    target = tiny_target("llama")
    sampling = sampling.model_copy(update={"suppress_tokens": (END,)})
    (prompt,) = prompts(1, seed=2)
    written = Engine(target).generate([prompt], sampling, NEW, ["a"])[0].token_ids
    assert len(written) == NEW
    assert teacher_forced(target, prompt, written, sampling, "a") == 0
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    assert teacher_forced(target, prompt, other, sampling, "a") == 1
    found = check(target, prompt, written, other, sampling, "a")
    assert (found.equal, found.first_difference, found.near_tie) == (False, NEW - 1, False)
    if sampling.temperature:
        assert teacher_forced(target, prompt, written, sampling, "b") > NEW // 4
    assert teacher_forced(target, prompt, [], sampling, "a") == 0


def test_the_gap_is_that_of_transformers_logits() -> None:
    target = tiny_target("qwen2")
    (prompt,) = prompts(1, seed=3)
    written = Engine(target).generate([prompt], Sampling(), 12)[0].token_ids
    with torch.no_grad():
        logits = target.model(torch.tensor([[*prompt, *written[:7]]])).logits[0, -1].double()
    second = int(logits.topk(2).indices[1])
    found = check(target, prompt, written, [*written[:7], second, 9], Sampling(), 0)
    assert found.first_difference == 7
    assert found.gap == pytest.approx(float(logits[written[7]] - logits[second]), rel=1e-4)


def test_counts_for_the_summary() -> None:
    found = [
        Equality(True, None, False, 0.0),
        Equality(False, 3, True, 1e-5),
        Equality(False, 0, False, 0.5),
        Equality(True, None, False, 0.0),
    ]
    counts = lossless(found)
    assert counts == Lossless(checked=4, equal=2, near_ties=1)
    assert counts.different == 1
