"""Token ids as text while they are written: a character whose bytes are spread over several tokens comes out whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokeniser:
    """The text of one stream of tokens, token by token; all pieces joined are the decoded answer.

    A piece is the growth of the decoded text. Text that ends in a replacement character is held back: the character's
    other bytes may come with the next token. Only the last piece's tokens are decoded again with each new one; they are
    needed because some tokenizers drop a text's leading space.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._window = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished, and for a skipped token."""
        self._ids.append(token)
        return self._grown(hold=True)

    def flush(self) -> str:
        """What is still held back, after the last token: unfinished characters as replacement characters."""
        return self._grown(hold=False)

    def _grown(self, hold: bool) -> str:
        before, now = self._decode(self._given), self._decode(len(self._ids))
        if hold and (now.endswith(BROKEN) or len(now) <= len(before)):
            return ""
        self._window, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def _decode(self, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[self._window : stop], skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


def token_texts(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
    """One text for each token, their concatenation the decoded whole; a split character stands at its last token."""
    detokeniser = Detokeniser(tokenizer, skip_special_tokens)
    texts = [detokeniser.push(token) for token in ids]
    if texts:
        texts[-1] += detokeniser.flush()
    return texts
