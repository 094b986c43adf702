"""Renderings and answer masks against hand-written expectations: the masked text must be what the target wrote."""

from __future__ import annotations

import re
from datetime import datetime
from itertools import groupby

import pytest
from tests.unit.target.tokenizers_for_tests import (
    CHATML,
    CHATML_MARKED,
    CHATML_MARKED_WIDELY,
    LLAMA3,
    PLAIN,
    QWEN3,
    R1,
    byte_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from draftsmith.foundation.errors import UserError
from draftsmith.target import chat
from draftsmith.target.chat import Rendered, prompt_ids, render, template_digest

TWO_TURNS = [
    {"role": "user", "content": "Hi\n\nthere"},
    {"role": "assistant", "content": "Hello 😀"},
    {"role": "user", "content": "the  time?"},
    {"role": "assistant", "content": "Five."},
]
THOUGHTFUL = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nno\n</think>\n\nNo."},
]


def answers(tokenizer: PreTrainedTokenizerFast, sample: Rendered) -> list[str]:
    """The text of each run of masked tokens."""
    assert len(sample.mask) == len(sample.ids)
    runs = groupby(zip(sample.mask, sample.ids, strict=True), key=lambda pair: pair[0])
    return [str(tokenizer.decode([i for _, i in run])) for masked, run in runs if masked]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, CHATML_MARKED_WIDELY])
@pytest.mark.parametrize("splits_words", [False, True])
def test_chatml_answers_with_their_end_and_without_what_follows_it(template: str, splits_words: bool) -> None:
    tokenizer = byte_tokenizer(template, splits_words=splits_words)
    (sample,) = render(tokenizer, TWO_TURNS)
    assert answers(tokenizer, sample) == ["Hello 😀<|im_end|>", "Five.<|im_end|>"]
    assert sample.text.endswith("<|im_end|>\n")
    assert tokenizer.decode(sample.ids) == sample.text


def test_ids_are_those_of_a_served_prompt_and_its_answer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    (sample,) = render(tokenizer, TWO_TURNS)
    for turn in (1, 3):
        prompt = prompt_ids(tokenizer, TWO_TURNS[:turn])
        assert sample.ids[: len(prompt)] == prompt
        assert sample.mask[len(prompt) - 1] is False
        assert sample.mask[len(prompt)] is True


def test_the_default_system_prompt_is_a_part_of_the_prompt() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert str(tokenizer.decode(prompt_ids(tokenizer, TWO_TURNS[:1]))).startswith(
        "<|im_start|>system\nBe kind<|im_end|>\n"
    )
    own = [{"role": "system", "content": "Be brief"}, TWO_TURNS[0]]
    assert "Be kind" not in str(tokenizer.decode(prompt_ids(tokenizer, own)))


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert render(tokenizer, TWO_TURNS[:3]) == render(tokenizer, TWO_TURNS[:2])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_llama3_has_one_beginning_token_and_a_pinned_date(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(LLAMA3, end="<|eot_id|>", adds_bos=adds_bos)
    (sample,) = render(tokenizer, TWO_TURNS)
    assert sample.ids.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(tokenizer, TWO_TURNS[:1]).count(tokenizer.bos_token_id) == 1
    assert answers(tokenizer, sample) == ["Hello 😀<|eot_id|>", "Five.<|eot_id|>"]
    assert "Today Date: 26 Jul 2024" in sample.text


@pytest.mark.parametrize("call", ["strftime_now('%Y-%m-%d')", 'strftime_now( format = "%Y-%m-%d" )'])
def test_a_clock_in_the_template_is_pinned(call: str) -> None:
    tokenizer = byte_tokenizer("{% if strftime_now is defined %}{{ " + call + " }}{% endif %}" + CHATML)
    (sample,) = render(tokenizer, TWO_TURNS)
    assert sample.text.startswith("2024-07-26<|im_start|>")
    assert str(datetime.now().year) not in sample.text


def test_a_clock_that_cannot_be_pinned_is_refused() -> None:
    tokenizer = byte_tokenizer("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML)
    with pytest.raises(UserError, match="can't be pinned"):
        render(tokenizer, TWO_TURNS)


def test_dropped_thoughts_give_one_sample_for_each_answer_as_it_was_served() -> None:
    tokenizer = byte_tokenizer(QWEN3)
    first, second = render(tokenizer, THOUGHTFUL)
    assert answers(tokenizer, first) == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]
    assert answers(tokenizer, second) == ["<think>\nno\n</think>\n\nNo.<|im_end|>"]
    assert "hm" not in second.text
    for sample, turn in ((first, 1), (second, 3)):
        prompt = prompt_ids(tokenizer, THOUGHTFUL[:turn])
        assert sample.ids[: len(prompt)] == prompt
        assert sample.mask[: len(prompt)] == [False] * len(prompt)


def test_an_empty_thought_before_an_answer_is_the_prompts() -> None:
    tokenizer = byte_tokenizer(QWEN3)
    samples = render(tokenizer, TWO_TURNS)
    assert [answers(tokenizer, sample) for sample in samples] == [["Hello 😀<|im_end|>"], ["Five.<|im_end|>"]]
    (single,) = render(tokenizer, TWO_TURNS[:2])
    prompt = prompt_ids(tokenizer, TWO_TURNS[:1], {"enable_thinking": False})
    assert single.mask.index(True) == len(prompt)
    assert single.ids[: len(prompt)] == prompt


def test_markers_and_dropped_thoughts_together() -> None:
    marked = QWEN3.replace(
        "{{- content + '<|im_end|>\n' }}", "{% generation %}{{- content }}{% endgeneration %}<|im_end|>\n"
    )
    assert marked != QWEN3
    tokenizer = byte_tokenizer(marked)
    samples = render(tokenizer, THOUGHTFUL)
    assert [answers(tokenizer, sample) for sample in samples] == [["Yes.<|im_end|>"], ["No.<|im_end|>"]]


def test_a_prompt_that_opens_a_thought_the_rendering_lacks() -> None:
    tokenizer = byte_tokenizer(R1, end="<|eos|>")
    samples = render(tokenizer, TWO_TURNS)
    assert [answers(tokenizer, sample) for sample in samples] == [["Hello 😀<|eos|>"], ["Five.<|eos|>"]]


def test_an_answer_that_would_merge_with_its_prompt_keeps_the_prompts_tokens() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    conversation = [TWO_TURNS[0], {"role": "assistant", "content": "\nFive."}]
    prompt = prompt_ids(tokenizer, conversation[:1])
    merged = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False))["input_ids"]
    assert merged[: len(prompt)] != prompt
    (sample,) = render(tokenizer, conversation)
    assert sample.ids[: len(prompt)] == prompt
    assert answers(tokenizer, sample) == ["\nFive.\n"]


def test_a_template_that_moves_the_prompt_is_refused() -> None:
    moving = "{{ messages | map(attribute='content') | reverse | join('|') }}"
    with pytest.raises(UserError, match="can't be told from the prompt's"):
        render(byte_tokenizer(moving), TWO_TURNS[:2])


def test_no_template() -> None:
    for call in (render, prompt_ids):
        with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
            call(byte_tokenizer(None), TWO_TURNS)
    with pytest.raises(UserError, match="no chat template"):
        template_digest(byte_tokenizer(None))


def test_an_empty_mask_shows_the_rendered_conversation() -> None:
    misplaced = CHATML_MARKED.replace(
        "{{ message['content'] }}{% endgeneration %}", "{% endgeneration %}{{ message['content'] }}"
    )
    assert misplaced != CHATML_MARKED
    with pytest.raises(UserError, match=re.escape("<|im_start|>assistant\nHello 😀<|im_end|>")):
        render(byte_tokenizer(misplaced), TWO_TURNS)


def test_no_assistant_message_shows_the_rendered_conversation() -> None:
    with pytest.raises(UserError, match=re.escape("<|im_start|>user\nHi\n\nthere<|im_end|>")):
        render(byte_tokenizer(CHATML), TWO_TURNS[:1])


def test_a_conversation_that_starts_with_the_assistant() -> None:
    with pytest.raises(UserError, match="starts with the assistant"):
        render(byte_tokenizer(CHATML), TWO_TURNS[1:])


def test_what_the_template_refuses_names_its_reason() -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match="roles system, user: System role not supported"):
        prompt_ids(byte_tokenizer(strict), [{"role": "system", "content": "x"}, TWO_TURNS[0]])


def test_digest_follows_template_special_tokens_and_variables() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert template_digest(tokenizer) == template_digest(byte_tokenizer(CHATML))
    others = {
        template_digest(byte_tokenizer(QWEN3)),
        template_digest(byte_tokenizer(CHATML, end="<|eos|>")),
        template_digest(tokenizer, {"enable_thinking": False}),
        template_digest(tokenizer),
    }
    assert len(others) == 4


def test_the_pinned_date_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_digest(byte_tokenizer(LLAMA3))
    monkeypatch.setattr(chat, "TODAY", chat.TODAY.replace(year=2023))
    assert template_digest(byte_tokenizer(LLAMA3)) != before


def test_a_variable_is_written_into_the_template() -> None:
    """As if it were given each time: prompts, samples and the digest."""
    given, plain, settled = ({"enable_thinking": False}, byte_tokenizer(QWEN3), byte_tokenizer(QWEN3))
    chat.settle(settled, given)
    assert prompt_ids(settled, TWO_TURNS[:1]) == prompt_ids(plain, TWO_TURNS[:1], given)
    assert prompt_ids(settled, TWO_TURNS[:1]) != prompt_ids(plain, TWO_TURNS[:1])
    assert render(settled, TWO_TURNS) == render(plain, TWO_TURNS, given)
    assert template_digest(settled) != template_digest(plain)
    known = template_digest(settled)
    chat.settle(settled, {})
    assert template_digest(settled) == known
    with pytest.raises(UserError, match="knows no variable 'thinking_enabled'"):
        chat.settle(plain, {"thinking_enabled": True})
