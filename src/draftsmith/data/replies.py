"""What a server is asked and what it answers: the tokens, wherever its JSON has them, and how faithful they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 300  # characters of a server's words in an error
ID_FIELDS = ("token_ids", "tokens", "output_ids")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt to be answered.

    Attributes:
        index: the caller's number for it.
        prompt_ids: what the server is to read.
        request: its name, which decides its seed.
        room: tokens that its answer may have, where that is less than for the others.
    """

    index: int
    prompt_ids: list[int]
    request: int | str
    room: int | None = None


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """What a server wrote.

    Attributes:
        index: of the prompt, as asked.
        token_ids: the answer's tokens, with the end token if it is complete.
        complete: it ended by itself; otherwise the limit cut it.
        exact: the ids are those that the server sampled; otherwise its text was tokenised again.
        text: as the server sent it, usually without special tokens.
    """

    index: int
    token_ids: list[int]
    complete: bool
    exact: bool
    text: str


@dataclass
class Tally:
    """How faithful a server's answers are, over one call of `answer` or several.

    Attributes:
        answers: all of them.
        without_ids: those that came as text only.
        drifted: of those with ids, how many another tokenisation of their text would have changed.
        unstable: of those without ids, how many texts differ from the text of their own tokens.
        misread: the server says that it read another number of prompt tokens than were sent.
    """

    answers: int = 0
    without_ids: int = 0
    drifted: int = 0
    unstable: int = 0
    misread: int = 0

    @property
    def drift(self) -> float | None:
        """The share of answers that tokenising their text again changes; a lower bound if none came with ids."""
        if with_ids := self.answers - self.without_ids:
            return self.drifted / with_ids
        return self.unstable / self.without_ids if self.without_ids else None

    def summary(self) -> str:
        """What is to be known of the answers' tokens, in a sentence or two."""
        with_ids = self.answers - self.without_ids
        if not self.answers:
            return "the server wrote no answer"
        if with_ids:
            drift = (
                f"tokenising the text again changes {self.drifted:,} of the {with_ids:,} with ids ({self.drift:.1%})"
            )
        else:
            drift = (
                f"at least {self.drift:.1%} of them drifted from what the server sampled (for {self.unstable:,} of "
                f"{self.without_ids:,} the text of the new tokens is another one)"
            )
        return f"{self.without_ids:,} of {self.answers:,} answers came without token ids; {drift}"

    def report(self) -> None:
        """Warn of what makes the answers less than the target's own tokens; silent if nothing does."""
        if self.without_ids:
            console.warn(
                f"{self.summary()}; a drafter learns best from the tokens themselves: serve with vLLM, or a recent "
                "SGLang or llama.cpp, which return them"
            )
        elif 2 * self.drifted > self.answers:
            console.warn(f"{self.summary()}: is the target's tokenizer the one that the server uses?")
        if self.misread:
            console.warn(
                f"for {self.misread:,} of {self.answers:,} prompts the server counted other tokens than were sent: it "
                "adds tokens of its own, so its answers are to other prompts than the target's template makes"
            )


def read(
    url: str,
    question: Asked,
    reply: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    tally: Tally,
) -> ServedAnswer:
    """The answer in a server's JSON, counted in `tally`.

    Raises:
        UserError: it is no completion, did not end in a usual way, or holds tokens that the tokenizer has not.
    """
    try:
        choice = reply["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise garbage(f"{url}/v1/completions", str(reply)) from None
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise garbage(f"{url}/v1/completions", f"text {text!r}, finish_reason {reason!r}")
    sampled = _sampled_ids(reply, choice, text)
    again = _encode(tokenizer, text)
    ids = list(again if sampled is None else sampled)
    if strange := [i for i in ids if not 0 <= i < len(tokenizer)]:
        raise UserError(
            f"{url} answers request {question.request!r} with token {strange[0]}, and the target's tokenizer has "
            f"{len(tokenizer):,}: serve the target itself"
        )
    ends = set(eos_ids)
    if (first := next((i for i, token in enumerate(ids) if token in ends), None)) is not None:
        del ids[first + 1 :]
    elif reason == "stop":
        ids.append(_end(choice, tokenizer, eos_ids))
    complete = first is not None or reason == "stop"
    tally.answers += 1
    tally.misread += _usage(reply, "prompt_tokens") not in (None, len(question.prompt_ids))
    if sampled is None:
        tally.without_ids += 1
        tally.unstable += tokenizer.decode(again, clean_up_tokenization_spaces=False) != text
    else:
        tally.drifted += again != (ids[:-1] if complete else ids)
    return ServedAnswer(question.index, ids, complete, sampled is not None, text)


def _sampled_ids(reply: Mapping[str, Any], choice: Mapping[str, Any], text: str) -> list[int] | None:
    """The token ids that the server sampled, wherever it puts them; None if it sends none."""
    for place in (choice, reply, reply.get("__verbose")):
        found = [place.get(name) for name in ID_FIELDS] if isinstance(place, Mapping) else []
        for ids in map(_ids, found):
            if ids is not None and (ids or not text):
                return ids
    # llama.cpp has them beside the probabilities, but leaves out tokens that end within a character
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if isinstance(content, list):
        ids = _ids([entry.get("id") if isinstance(entry, dict) else None for entry in content])
        if ids and len(ids) == _usage(reply, "completion_tokens"):
            return ids
    return None


def _ids(found: Any) -> list[int] | None:
    return found if isinstance(found, list) and all(type(i) is int for i in found) else None


def _usage(reply: Mapping[str, Any], name: str) -> int | None:
    usage = reply.get("usage")
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if type(found) is int else None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _end(choice: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> int:
    """The end token of an answer that came without: what the server names (vLLM, SGLang), else the tokenizer's."""
    named = (choice.get("stop_reason"), choice.get("matched_stop"), tokenizer.eos_token_id)
    return next((int(i) for i in named if type(i) is int and i in eos_ids), eos_ids[0])


def garbage(url: str, said: str) -> UserError:
    """The error for what is no answer of the protocol."""
    return UserError(
        f"{url} answers with something that is not of OpenAI's protocol, is it such a server? It says: {cut(said)}"
    )


def cut(text: str) -> str:
    """A server's words on one line, and not too many."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
