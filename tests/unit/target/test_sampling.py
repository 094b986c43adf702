"""Processors against transformers' `generate`, the draw, and the plain batched loop against the engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.tiny import END, prompts, tiny_target

from draftsmith.decoding.engine import Engine
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling, Written, draw, next_tokens, processed, write

PATHS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 0.7, "no_repeat_ngram_size": 3, "suppress_tokens": (12, 40)},
    {"suppress_tokens": (9, 33)},
    {"repetition_penalty": 1.4, "forced_eos_token_id": 33, "forced_bos_token_id": 20, "suppress_tokens": (9, 40)},
]
WARPS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 9},
    {"temperature": 1.7, "top_p": 0.7},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.6},
    {"temperature": 1.2, "epsilon_cutoff": 0.02},
    {"temperature": 1.2, "top_p": 0.95, "eta_cutoff": 0.03},
    {"temperature": 0.0},
]


@pytest.mark.parametrize(("path", "warp"), list(itertools.product(PATHS, WARPS)))
def test_scores_equal_those_of_generate(path: dict[str, Any], warp: dict[str, Any]) -> None:
    """`generate` hands out raw logits and processed scores of each step: ours of the same logits are the same."""
    options = {**path, **warp}
    sampling = Sampling(**options)
    target = tiny_target("llama")
    prompt = prompts(1, seed=2, low=12, high=12)[0]
    prompt[-4:] = prompt[:4]  # so that n-grams can repeat at once
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if sampling.temperature:
        asked = {"do_sample": True, "top_k": 0, **asked}
    else:
        asked.pop("temperature")
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    out = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **asked,
    )
    text = out.sequences[0].tolist()
    contexts = [text[: len(prompt) + i] for i in range(len(out.scores))]
    found = processed(torch.cat(out.logits), contexts, sampling, [len(prompt) + 9] * len(contexts))
    torch.testing.assert_close(found, torch.cat(out.scores), rtol=0, atol=0)
    changed = int((found != torch.cat(out.logits)).sum())
    assert (changed > 0) == (options not in ({"temperature": 1.0}, {"temperature": 0.0}))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_forced_tokens_stand_where_generate_puts_them(temperature: float) -> None:
    """A token forced to the answer's end, and one behind a prompt of one token."""
    target = tiny_target("llama")
    options: dict[str, Any] = {"forced_eos_token_id": 33, "forced_bos_token_id": 20, "suppress_tokens": (END,)}
    for prompt in ([9], prompts(1, seed=2)[0]):
        ids = torch.tensor([prompt])
        asked = {**options, "suppress_tokens": [END]}
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        theirs = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **sampled, **asked)[
            0
        ].tolist()
        ours = Engine(target).generate([prompt], Sampling(temperature=temperature, **options), 8)[0].token_ids
        assert len(ours) == len(theirs) - len(prompt) == 8
        assert ours[-1] == theirs[-1] == 33
        assert (ours[0] == 20) == (len(prompt) == 1)
        if not temperature:
            assert ours == theirs[len(prompt) :]
        written = list(write(target, [prompt], [0], Sampling(temperature=temperature, **options), 8))
        assert [e.token_ids for e in written if isinstance(e, Written)] == [ours]


def test_scores_are_wide_whatever_the_logits_are() -> None:
    logits = torch.randn(3, 7)
    assert processed(logits.bfloat16(), None, Sampling(temperature=0.5)).dtype == torch.float32
    assert processed(logits.double(), None, Sampling(temperature=0.5)).dtype == torch.float64
    kept = logits.clone()
    processed(logits, [[1], [2], [3]], Sampling(temperature=0.5, repetition_penalty=2.0, suppress_tokens=(1,), top_k=2))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_rows_are_processed_independently(penalty: float) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    contexts = [[1, 2], [3], [4, 4, 4], [5, 6, 7, 8]]
    sampling = Sampling(temperature=0.9, top_p=0.8, repetition_penalty=penalty, no_repeat_ngram_size=2)
    together = processed(logits, contexts, sampling)
    for r in range(4):
        torch.testing.assert_close(together[r : r + 1], processed(logits[r : r + 1], [contexts[r]], sampling))


def test_the_draw_is_gumbel_max_of_the_keyed_noise() -> None:
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    keys = torch.tensor([3, 9, 3, 4, 9])
    found = draw(scores, keys, Sampling(temperature=1.0))
    for r in range(5):
        noise = -torch.log(-torch.log(seeding.uniform(keys[r], 6)))
        assert int(found[r]) == int((scores[r].double() + noise).argmax())


def test_a_filtered_token_is_never_drawn() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 5.0, -torch.inf]]).expand(5000, -1)
    drawn = draw(scores, torch.arange(5000), Sampling(temperature=1.0))
    assert set(drawn.tolist()) == {0, 2}


def test_greedy_takes_the_largest_and_needs_no_key() -> None:
    scores = torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    assert draw(scores, None, Sampling()).tolist() == [1, 0]
    tokens = next_tokens(scores[:, None], Sampling(), ["a", "b"], torch.tensor([[4], [5]]))
    assert tokens.tolist() == [[1], [0]]


class Watched:
    """Writes down how many sequences each pass of a target holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
        self.batches: list[int] = []
        verify = target.verify

        def watched(rows: Any, want: Any) -> Any:
            self.batches.append(rows.tokens.shape[0])
            return verify(rows, want)

        monkeypatch.setattr(target, "verify", watched)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"temperature": 1.2, "repetition_penalty": 1.3}])
def test_writing_equals_the_plain_engine_and_rows_leave(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target("llama")
    sampling = Sampling(seed=3, **options)
    asked = prompts(10, seed=40)
    names: list[int | str] = [f"row {i}" for i in range(len(asked))]
    expected = Engine(target).generate(asked, sampling, 40, requests=names)
    watched = Watched(monkeypatch, target)
    events = list(write(target, asked, names, sampling, 40))
    finished = {e.row: e for e in events if isinstance(e, Written)}
    assert sorted(finished) == list(range(len(asked)))
    for i, g in enumerate(expected):
        assert finished[i].token_ids == g.token_ids
        assert finished[i].complete == (g.finish == "stop")
    counts = [e for e in events if isinstance(e, int)]
    lengths = [len(g.token_ids) for g in expected]
    assert counts == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert watched.batches == counts[1:]
    if options:
        assert len(set(counts)) > 2, "no row left early"


def test_writing_stops_at_the_longest_position() -> None:
    target = tiny_target("llama")
    sampling = Sampling(suppress_tokens=(END,))
    asked = [[8 + i % 80 for i in range(target.spec.max_positions - left)] for left in (1, 4)]
    found = {e.row: e for e in write(target, asked, [0, 1], sampling, 9) if isinstance(e, Written)}
    assert [len(found[row].token_ids) for row in range(2)] == [1, 4]
    assert not found[0].complete
    assert [g.token_ids for g in Engine(target).generate(asked, sampling, 9)] == [
        found[0].token_ids,
        found[1].token_ids,
    ]


@pytest.mark.parametrize("length", [0, 256])
def test_a_prompt_without_room_is_refused(length: int) -> None:
    target = tiny_target("llama")
    asked = [[9, 9], [9] * length]
    with pytest.raises(UserError, match="prompt 1"):
        list(write(target, asked, [0, 1], Sampling(), 5))
    with pytest.raises(UserError, match="prompt 1"):
        Engine(target).generate(asked, Sampling(), 5)


def test_no_prompts_give_no_answers() -> None:
    target = tiny_target("llama")
    assert list(write(target, [], [], Sampling(), 5)) == []
    assert Engine(target).generate([], Sampling(), 5) == []
