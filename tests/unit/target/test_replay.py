"""A stored answer as a target, against following its text by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_target
from tests.unit.decoding.trees import Node, ancestors, forests, packed

from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import ReplayTarget, StoredAnswer

WANT = FeatureSpec((1, 3), final=True)


def stored(texts: list[list[int]], prompt_lengths: list[int], seed: int = 0) -> list[StoredAnswer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        StoredAnswer(text, n, {k: torch.randn(len(text), 5, generator=generator) for k in WANT.names})
        for text, n in zip(texts, prompt_lengths, strict=True)
    ]


def started(answers: list[StoredAnswer]) -> ReplayTarget:
    target = ReplayTarget(tiny_target("llama").spec, answers)
    lengths = [a.prompt_length for a in answers]
    ids = torch.zeros((len(answers), max(lengths)), dtype=torch.int64)
    target.prefill(ids, lengths, WANT, 99)
    return target


def test_prefill_gives_the_first_token_and_the_prompts_states() -> None:
    answers = stored([[5, 6, 7, 8], [5, 9]], [3, 1])
    target = ReplayTarget(tiny_target("llama").spec, answers)
    out = target.prefill(torch.zeros((2, 3), dtype=torch.int64), [3, 1], WANT, 9)
    assert out.logits is None
    assert out.choices is not None
    assert out.choices.tolist() == [[8], [9]]
    for b, n in ((0, 3), (1, 1)):
        for name in WANT.names:
            assert torch.equal(out.hidden[name][b, :n], answers[b].hidden[name][:n])


@given(forests(most=8, tokens=2), st.data())
@settings(deadline=None)
def test_choices_are_what_the_answer_writes_next(rows: list[list[Node]], data: st.DataObject) -> None:
    """Texts of two letters, so that trees often follow them; partly committed, some shorter than the tree is deep."""
    texts = [data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=9)) for _ in rows]
    prompts = [data.draw(st.integers(1, len(t) - 1)) for t in texts]
    answers = stored(texts, prompts)
    target = started(answers)
    done = [data.draw(st.integers(0, len(t) - 1 - n)) for t, n in zip(texts, prompts, strict=True)]
    target.commit(torch.zeros((len(rows), 1), dtype=torch.int64), done)
    tree = packed(rows)
    places = [n + d for n, d in zip(prompts, done, strict=True)]
    out = target.verify(tree.rows(torch.tensor([t[p] for t, p in zip(texts, places, strict=True)])), WANT)
    assert out.choices is not None
    for b, row in enumerate(rows):
        for node in range(-1, len(row)):
            drafted = [row[i].token for i in ancestors(row, node)]
            place = places[b] + len(drafted)
            on_path = texts[b][places[b] + 1 : place + 1] == drafted
            follows = texts[b][place + 1] if on_path and place + 1 < len(texts[b]) else -1
            assert int(out.choices[b, node + 1]) == follows
            if on_path:
                for name in WANT.names:
                    assert torch.equal(out.hidden[name][b, node + 1], answers[b].hidden[name][place])


def test_answers_leave_the_batch() -> None:
    answers = stored([[5, 6, 7], [5, 9, 4, 3], [1, 2, 3, 4, 5]], [1, 1, 2])
    target = started(answers)
    target.commit(torch.zeros((3, 1), dtype=torch.int64), [0, 1, 1])
    target.select([2, 1])
    out = target.verify(packed([[], []]).rows(torch.tensor([4, 4])), FeatureSpec((3,)))
    assert out.choices is not None
    assert out.choices.tolist() == [[5], [3]]
    assert torch.equal(out.hidden[3][0, 0], answers[2].hidden[3][3])
    assert torch.equal(out.hidden[3][1, 0], answers[1].hidden[3][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_keep_their_number_format(dtype: torch.dtype) -> None:
    answers = [StoredAnswer([1, 2, 3], 1, {2: torch.ones(3, 4, dtype=dtype)})]
    target = ReplayTarget(tiny_target("llama").spec, answers)
    assert target.prefill(torch.zeros((1, 1), dtype=torch.int64), [1], FeatureSpec((2,)), 9).hidden[2].dtype == dtype
