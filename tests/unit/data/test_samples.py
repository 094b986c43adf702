"""Samples: the target's own tokens untouched, the template's otherwise."""

from __future__ import annotations

import pytest
from tests.unit.target.tokenizers_for_tests import CHATML, CHATML_MARKED, QWEN3, byte_tokenizer

from draftsmith.data.conversations import Answer, Conversation, Message
from draftsmith.data.samples import Sample, samples_of
from draftsmith.foundation.errors import UserError
from draftsmith.target import chat

TALK = (Message("user", "One?"), Message("assistant", "Yes."), Message("user", "Two?"), Message("assistant", "No."))


def test_own_tokens_are_taken_as_they_are() -> None:
    answer = Answer(prompt_ids=(5, 6, 7), token_ids=(8, 9), complete=False, temperature=0.0, seed=0)
    conversation = Conversation("a", TALK[:2], answer=answer)
    # no template is asked: this tokenizer has none
    assert samples_of(conversation, byte_tokenizer(None)) == [
        Sample("a", [5, 6, 7, 8, 9], [False, False, False, True, True], complete=False)
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_a_rendered_conversation_is_one_sample(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    (sample,) = samples_of(Conversation("a", TALK), tokenizer)
    (rendered,) = chat.render(tokenizer, [{"role": m.role, "content": m.content} for m in TALK])
    assert (sample.id, sample.ids, sample.mask, sample.complete) == ("a", rendered.ids, rendered.mask, True)
    answers = [i for i, answer in zip(sample.ids, sample.mask, strict=True) if answer]
    assert tokenizer.decode(answers) == "Yes.<|im_end|>No.<|im_end|>"


def test_one_sample_for_each_answer_has_a_name_for_each() -> None:
    samples = samples_of(Conversation("a", TALK), byte_tokenizer(QWEN3))
    assert [sample.id for sample in samples] == ["a@1", "a@2"]


@pytest.mark.parametrize("messages", [TALK[:3], (TALK[0], Message("assistant", ""), *TALK[2:])])
def test_what_waits_for_an_answer_is_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(UserError, match="conversation a waits for an answer"):
        samples_of(Conversation("a", messages), byte_tokenizer(CHATML))


def test_errors_name_the_conversation() -> None:
    with pytest.raises(UserError, match="conversation a: .*no chat template"):
        samples_of(Conversation("a", TALK), byte_tokenizer(None))
