"""What is asked in a measurement, and in which order: prompts, turns, temperatures, repeats.

A conversation whose earlier answers are still to be written (MT-Bench) is asked turn by turn, each turn a prompt of its
own; what stands before a later turn is what plain decoding wrote in the same measurement, so that everybody reads the
same prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.conversations import Conversation, Message, subset
from draftsmith.evaluation import measured
from draftsmith.evaluation.measured import PLAIN, Row
from draftsmith.foundation.errors import UserError
from draftsmith.target import chat
from draftsmith.target.model import HFTarget

Place = tuple[str, str, float, int]
"""Set, id, temperature and repeat: what a row and plain decoding's share."""


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        set: its set of prompts.
        id: the conversation's, and `@n` where it has several turns to be answered.
        text: the user's last message.
        messages: all up to that; empty answers among them are filled in from the rows of `before`.
        before: the ids of the earlier turns that are asked in this measurement.
        reference: the gold answer, where there is one.
    """

    set: str
    id: str
    text: str
    messages: tuple[Message, ...]
    before: tuple[str, ...] = ()
    reference: str | None = None

    def prompt_ids(self, target: HFTarget, plain: Mapping[Place, Row], temperature: float, repeat: int) -> list[int]:
        """Token ids of the prompt, earlier answers from `plain` rows.

        Raises:
            UserError: it is too long, the template refuses it, or an earlier answer is missing.
        """
        earlier = iter(self.before)
        messages = []
        for message in self.messages:
            content = message.content
            if message.role == "assistant" and not content:
                row = plain.get((self.set, next(earlier), temperature, repeat))
                if row is None:
                    raise UserError("its earlier turn could not be measured")
                content = target.tokenizer.decode(row["generation"]["token_ids"], skip_special_tokens=True)
            messages.append(Message(message.role, content))
        ids = chat.prompt_ids(target.tokenizer, messages)
        if len(ids) + 2 > target.spec.max_positions:
            raise UserError(
                f"the prompt has {len(ids)} tokens; {target.spec.name} takes {target.spec.max_positions} in all"
            )
        return list(ids)


@dataclass(frozen=True)
class Unit:
    """Prompts that are decoded together, in every mode; `begins` says which mode is the first."""

    asked: tuple[Asked, ...]
    temperature: float
    repeat: int
    begins: int

    def keys(self, modes: Sequence[str]) -> set[measured.Key]:
        """The rows it makes."""
        return {(a.set, a.id, self.temperature, self.repeat, mode) for a in self.asked for mode in modes}

    def prompts(self, target: HFTarget, plain: Mapping[Place, Row]) -> list[list[int]]:
        """Token ids of its prompts; see `Asked.prompt_ids`."""
        return [a.prompt_ids(target, plain, self.temperature, self.repeat) for a in self.asked]


def plan(
    target: HFTarget,
    sets: Mapping[str, Sequence[Conversation]],
    prompts: int,
    batch: int,
    temperatures: Sequence[float],
    repeats: int,
    seed: int,
    failed: list[Row],
) -> list[Unit]:
    """All units in order: sets by turns, so that a machine that slows down meets all of them.

    Of each set, `prompts` conversations at most, chosen by the seed. What can't be asked is added to `failed`.
    """
    groups: list[list[tuple[Asked, ...]]] = []
    for name, conversations in sets.items():
        asked = []
        for conversation in subset(conversations, prompts, seed, "bench", name):
            try:
                turns = turns_of(name, conversation)
                turns[0].prompt_ids(target, {}, 0.0, 0)
                asked.append(turns)
            except UserError as problem:
                lost = Asked(name, conversation.id, _question(conversation), ())
                failed.append(failure(lost, problem, None))
        together = [asked[i : i + batch] for i in range(0, len(asked), batch)]
        # a later turn right after the earlier one, which writes its prompt
        rows = (zip_turns(group) for group in together)
        groups.append(list(itertools.chain.from_iterable(rows)))
    mixed = [
        (place, group)
        for row in itertools.zip_longest(*(list(enumerate(group)) for group in groups))
        for place, group in filter(None, row)
    ]
    return [
        Unit(group, temperature, repeat, place + step + repeat)
        for repeat in range(repeats)
        for place, group in mixed
        for step, temperature in enumerate(temperatures)
    ]


def zip_turns(asked: Sequence[Sequence[Asked]]) -> list[tuple[Asked, ...]]:
    """Conversations' turns → first turns together, second turns together, …"""
    return [tuple(filter(None, turn)) for turn in itertools.zip_longest(*asked)]


def turns_of(name: str, conversation: Conversation) -> list[Asked]:
    """The prompts of a conversation: its last user message, and each before it whose answer is a placeholder.

    Raises:
        UserError: it asks nothing.
    """
    messages = list(conversation.messages)
    while messages and messages[-1].role != "user":
        messages.pop()
    if not messages:
        raise UserError("the conversation asks nothing: it has no user message")
    waiting = [i - 1 for i, m in enumerate(messages) if m.role == "assistant" and not m.content]
    places = [*(i for i in waiting if i >= 0), len(messages) - 1]
    names = [f"{conversation.id}@{n}" for n in range(1, len(places) + 1)] if len(places) > 1 else [conversation.id]
    last = len(places) - 1
    return [
        Asked(
            name,
            names[n],
            messages[place].content,
            tuple(messages[: place + 1]),
            tuple(names[:n]),
            conversation.reference if n == last else None,
        )
        for n, place in enumerate(places)
    ]


def failure(asked: Asked, problem: Exception, temperature: float | None) -> Row:
    """A row of the list of failures."""
    said = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
    return {"set": asked.set, "id": asked.id, "prompt": asked.text, "temperature": temperature, "error": said}


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> dict[Place, Row]:
    """Plain decoding's rows by their place."""
    return {measured.pair(row): dict(row) for row in rows if row["mode"] == PLAIN}


def _question(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
