"""Conversations as token ids with an answer mask: what is scored, and what drafters train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftsmith.data.conversations import Conversation
from draftsmith.foundation.errors import UserError
from draftsmith.target import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One text in the target's tokens.

    Attributes:
        id: the conversation's, with `@turn` behind it where a conversation gives several samples.
        ids: `T` token ids.
        mask: `T` flags, true for answer tokens, an answer's end token included.
        complete: the last answer has its end; a cut one teaches none.
    """

    id: str
    ids: list[int]
    mask: list[bool]
    complete: bool


def samples_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The samples of a conversation: the target's own tokens where it wrote the answer, else the chat template's.

    A regenerated answer is never tokenised again: its text may come from other tokens than the target sampled.

    Raises:
        UserError: an answer is still to be generated, or the template gives no answer token.
    """
    if (answer := conversation.answer) is not None:
        ids = [*answer.prompt_ids, *answer.token_ids]
        mask = [False] * len(answer.prompt_ids) + [True] * len(answer.token_ids)
        return [Sample(conversation.id, ids, mask, answer.complete)]
    if conversation.waits:
        raise UserError(
            f"conversation {conversation.id} waits for an answer (its last message is the user's, or an assistant's "
            "message is empty): let the target write it first (draftsmith regenerate)"
        )
    try:
        rendered = chat.render(tokenizer, conversation.messages)
    except UserError as problem:
        raise UserError(f"conversation {conversation.id}: {problem}") from problem
    several = len(rendered) > 1
    return [
        Sample(f"{conversation.id}@{turn}" if several else conversation.id, list(part.ids), list(part.mask), True)
        for turn, part in enumerate(rendered, start=1)
    ]
