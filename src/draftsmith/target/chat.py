"""Conversations as the target reads them: the chat template's token ids, and which of them are the target's answers.

Where the answer tokens are is found in this order: generation markers in the template; else by rendering the
conversation up to each answer with a generation prompt, which must be how the whole rendering starts; and where it is
not (templates of thinking models drop earlier thoughts), every answer becomes a sample of its own, rendered as served.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from draftsmith.foundation.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase


class Turn(Protocol):
    """A message as an object, for instance `data.conversations.Message`."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


Messages = Sequence[Mapping[str, str] | Turn]
Rows = list[dict[str, str]]

# Templates of the Llama 3 family print today's date; this is the one they fall back to. Pinned, prompts stay the same.
TODAY = date(2024, 7, 26)
SHOWN = 1500  # characters of a rendered conversation in an error

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CLOCK = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Rendered:
    """A conversation in the target's tokens.

    Attributes:
        ids: token ids, `T` of them, as the target reads them; special tokens are the template's, none are added.
        mask: `T` flags, true for the tokens that the target writes: the answers, each with the token that ends it.
        text: what was tokenised.
    """

    ids: list[int]
    mask: list[bool]
    text: str


def prompt_ids(tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, object] | None = None) -> list[int]:
    """Token ids of a conversation that waits for its next answer (the template's generation prompt is added).

    Args:
        messages: rows or objects with `role` and `content`.
        variables: further variables that this template knows, for instance `enable_thinking`.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    return _Renderer(tokenizer, variables).prompt(_rows(messages)).ids


def render(tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, object] | None = None) -> list[Rendered]:
    """Token ids and answer mask of a conversation, up to its last answer.

    Args:
        messages: rows or objects with `role` and `content`.
        variables: as in `prompt_ids`.

    Returns:
        One sample; or one for each answer, with only that answer in its mask, where the template renders a turn
        differently once another follows it.

    Raises:
        UserError: there is no chat template, the template refuses the conversation, or no token is an answer's (the
            text shows the rendered conversation).
    """
    renderer = _Renderer(tokenizer, variables)
    rows = _rows(messages)
    turns = [index for index, row in enumerate(rows) if row["role"] == "assistant"]
    if not turns:
        shown = renderer.rendering(rows).text
        raise UserError(f"this conversation has no assistant message, so it teaches nothing:\n{_cut(shown)}")
    if turns[0] == 0:
        raise UserError("this conversation starts with the assistant: there is no prompt that it answers")
    until = [renderer.rendering(rows[: index + 1]) for index in turns]
    whole = until[-1]
    if all(_starts(whole.ids, part.ids) for part in until):
        joined = renderer.mark_turns(rows, turns, [len(part.ids) for part in until], whole)
        if joined is not None:
            return [_with_answer(joined)]
    samples = [renderer.mark_last(rows[: index + 1], part) for index, part in zip(turns, until, strict=True)]
    return [_with_answer(sample) for sample in samples]


def template_digest(tokenizer: Tokenizer, variables: Mapping[str, object] | None = None) -> str:
    """16 hexadecimal digits of all that decides how a conversation becomes text: template, special tokens, date."""
    content = {
        "template": _template(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "variables": _variables(variables),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def settle(tokenizer: Tokenizer, variables: Mapping[str, object]) -> None:
    """Write variables into a tokenizer's chat template, for all that is rendered with it from now on.

    They stand in the template's text, so that digests tell and exports carry them.

    Raises:
        UserError: the tokenizer has no chat template, or the template knows no such variable.
    """
    template = _template(tokenizer) if variables else ""
    if unknown := [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)]:
        raise UserError(f"target.template: the target's chat template knows no variable {unknown[0]!r}")
    settings = "".join("{%- set " + f"{name} = {_literal(value)}" + " %}" for name, value in variables.items())
    if variables:
        tokenizer.chat_template = settings + template


def _literal(value: object) -> str:
    """A value as Jinja writes it."""
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


@dataclass(frozen=True)
class _Rendering:
    text: str
    ids: list[int]


class _Renderer:
    """A tokenizer with its template, and its special tokens at hand."""

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, object] | None) -> None:
        self._tokenizer = tokenizer
        self._template = _template(tokenizer)
        self._variables = _variables(variables)
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}

    def prompt(self, rows: Rows, **options: Any) -> _Rendering:
        return self.rendering(rows, add_generation_prompt=True, **options)

    def rendering(self, rows: Rows, **options: Any) -> _Rendering:
        text = self._apply(rows, tokenize=False, **options)
        return _Rendering(text, self._encode(text))

    def mark_turns(self, rows: Rows, turns: Sequence[int], stops: Sequence[int], whole: _Rendering) -> Rendered | None:
        """All answers of a rendering that grows turn by turn; None if some generation prompt is not in it as it is.

        `stops[j]` is the number of tokens after turn `turns[j]`.
        """
        mask = [False] * len(whole.ids)
        marked = self._marked(rows[: turns[-1] + 1])
        start = 0
        for index, stop in zip(turns, stops, strict=True):
            if marked is None:
                head = self._longest_prompt(rows[:index], whole.ids)
                if head is None:
                    return None
                start = head
            self._mark(mask, marked, whole.ids, start, stop)
            start = stop
        return Rendered(whole.ids, mask, whole.text)

    def mark_last(self, rows: Rows, whole: _Rendering) -> Rendered:
        """The last answer alone, after the prompt that it answered."""
        marked = self._marked(rows)
        prompt = self.prompt(rows[:-1])
        ids = whole.ids
        if marked is None and not _starts(ids, prompt.ids) and whole.text.startswith(prompt.text):
            # A token of the whole rendering spans prompt and answer; a served model reads the prompt's own tokens.
            ids = prompt.ids + self._encode(whole.text.removeprefix(prompt.text))
        start = self._longest_prompt(rows[:-1], ids)
        if start is None:
            # The generation prompt opens a thought that a rendered answer lacks: the answer starts where they part.
            shared = whole.text[: _shared(whole.text, prompt.text)]
            if rows[-2]["content"].strip() not in shared:
                raise UserError(
                    "this target's chat template renders the messages before an answer differently once it is there, "
                    f"so the answer's tokens can't be told from the prompt's; before:\n{_cut(prompt.text)}\n"
                    f"after:\n{_cut(whole.text)}"
                )
            start = _shared(ids, prompt.ids)
        mask = [False] * len(ids)
        self._mark(mask, marked, ids, start, len(ids))
        return Rendered(ids, mask, whole.text)

    def _mark(self, mask: list[bool], marked: Sequence[bool] | None, ids: Sequence[int], start: int, stop: int) -> None:
        """Set the flags of one turn's answer, in tokens `start … stop-1`, up to its end token and not beyond."""
        end = self._end(ids, start, stop)
        for index in range(start, stop if end is None else end):
            mask[index] = marked is None or marked[index]
        if end is not None and any(mask[start:end]):
            mask[end - 1] = True

    def _end(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        """One past the special token that closes tokens `start … stop-1`; None if they don't close with one."""
        for index in range(stop - 1, start - 1, -1):
            if ids[index] in self._special:
                return index + 1
            if str(self._tokenizer.decode([ids[index]])).strip():
                return None
        return None

    def _longest_prompt(self, rows: Rows, ids: Sequence[int]) -> int | None:
        """Tokens of the generation prompt that `ids` start with, None if they start with none.

        Templates of thinking models put an empty thought before an answer without thoughts. Served so, that thought is
        a part of the prompt (`enable_thinking` off), not something that the model wrote.
        """
        found = None
        for extra in ({}, {"enable_thinking": False}) if "enable_thinking" in self._template else ({},):
            prompt = self.prompt(rows, **extra)
            if _starts(ids, prompt.ids):
                found = max(found or 0, len(prompt.ids))
        return found

    def _marked(self, rows: Rows) -> list[bool] | None:
        """The template's own answer marks, or None if it has no markers."""
        if not _MARKER.search(self._template):
            return None
        encoded = self._apply(
            rows,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marks = [bool(flag) for flag in encoded["assistant_masks"]]
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        for i in range(1, len(marks)):
            # transformers marks only the first of several tokens that spell a block's last character (an emoji's bytes)
            marks[i] = marks[i] or (marks[i - 1] and spans[i][0] < spans[i - 1][1])
        return marks

    def _apply(self, rows: Rows, **options: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                rows, chat_template=self._template, **{**self._variables, **options}
            )
        except TemplateError as problem:
            roles = ", ".join(row["role"] for row in rows)
            raise UserError(
                f"the target's chat template refuses a conversation of the roles {roles}: {problem}"
            ) from problem

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens, a beginning-of-sequence token among them: none may be added again.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _rows(messages: Messages) -> Rows:
    return [
        dict(message) if isinstance(message, Mapping) else {"role": message.role, "content": message.content}
        for message in messages
    ]


def _template(tokenizer: Tokenizer) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this target'} has no chat template, so conversations can't "
            "be put before the model: take its chat (instruct) version, or add a chat_template.jinja to its folder"
        ) from None
    return _pinned(template)


@lru_cache(maxsize=8)
def _pinned(template: str) -> str:
    """The template with the clock replaced by `TODAY` (transformers gives templates a clock but no way to set it)."""
    pinned = _CLOCK.sub(lambda call: json.dumps(TODAY.strftime(call[2])), template)
    if "strftime_now(" in pinned:
        raise UserError(
            "the target's chat template prints the present time in a form that can't be pinned, so a conversation "
            "would be tokenised differently from day to day: put a fixed date into its chat_template.jinja"
        )
    return pinned


def _variables(variables: Mapping[str, object] | None) -> dict[str, object]:
    return {"date_string": TODAY.strftime("%d %b %Y"), **(variables or {})}


def _starts(ids: Sequence[int], head: Sequence[int]) -> bool:
    return list(ids[: len(head)]) == list(head)


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many elements two sequences have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_answer(sample: Rendered) -> Rendered:
    if not any(sample.mask):
        raise UserError(
            "no token of this conversation is an answer's, so it teaches nothing (are the template's generation "
            f"markers around the answer?); it is rendered as:\n{_cut(sample.text)}"
        )
    return sample


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
