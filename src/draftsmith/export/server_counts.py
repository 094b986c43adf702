"""What a vLLM server counted of its speculation: the counters of its `/metrics`, before and after some requests.

Read from vLLM 0.32.0 (v1/spec_decode/metrics.py): `drafts` counts rounds, `draft_tokens` what was proposed in them,
`accepted_tokens` what was kept of it, before the cut at an answer's end and without the bonus token.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import httpx

from draftsmith.evaluation.endpoint import read_counters
from draftsmith.foundation.errors import UserError

WRITTEN = "vllm:generation_tokens_total"
PAUSE, PAUSES = 0.2, 25  # seconds between looks at counters that still move, and looks at most

_WRITTEN = re.compile(rf"^{WRITTEN}(?:\{{.*\}})?\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class ServerCounts:
    """Counters since the server's start, or their difference.

    Attributes:
        rounds: rounds in which something was drafted.
        drafted: drafted tokens.
        accepted: accepted ones.
        at_depth: rounds that accepted depth 1, 2, ….
        written: tokens of all answers.
    """

    rounds: int
    drafted: int
    accepted: int
    at_depth: tuple[int, ...]
    written: int

    def __sub__(self, other: ServerCounts) -> ServerCounts:
        depths = max(len(self.at_depth), len(other.at_depth))
        mine, theirs = (counts + (0,) * (depths - len(counts)) for counts in (self.at_depth, other.at_depth))
        return ServerCounts(
            self.rounds - other.rounds,
            self.drafted - other.drafted,
            self.accepted - other.accepted,
            tuple(a - b for a, b in zip(mine, theirs, strict=True)),
            self.written - other.written,
        )

    @property
    def acceptance_length(self) -> float:
        """1 + accepted ÷ rounds, as vLLM prints it."""
        return 1 + self.accepted / self.rounds if self.rounds else float("nan")

    @property
    def tokens(self) -> int:
        """Speculative tokens of a round."""
        return round(self.drafted / self.rounds) if self.rounds else 0


def parse(text: str, where: str) -> ServerCounts:
    """The counters in a page of Prometheus' text format, those of several engines added up.

    Args:
        where: names the page in errors.

    Raises:
        UserError: the page is not vLLM's, or its server does not speculate.
    """
    written = [float(found[1]) for found in _WRITTEN.finditer(text)]
    if not written:
        raise UserError(
            f"{where} holds no counters of vLLM's ({WRITTEN}): served acceptance is read from vLLM servers only, with "
            "their statistics on (not --disable-log-stats)"
        )
    if (found := read_counters(text)) is None:
        raise UserError(
            f"{where}: the server does not speculate (it counts no drafts): start it with --speculative-config, as the "
            "export's README.md says"
        )
    return ServerCounts(found.drafts, found.drafted, found.accepted, found.at_position, int(sum(written)))


def read(url: str, timeout: float = 10.0) -> ServerCounts:
    """The counters of the server at `url`, now.

    Raises:
        UserError: it can't be reached, or as `parse`.
    """
    page = f"{url}/metrics"
    try:
        response = httpx.get(page, timeout=timeout, follow_redirects=True)
    except httpx.HTTPError as problem:
        raise UserError(
            f"no server can be reached at {page} ({type(problem).__name__}): is it running there?"
        ) from None
    if not response.is_success:
        raise UserError(f"{page} answers with status {response.status_code}: served acceptance is read from vLLM only")
    return parse(response.text, page)


def settled(url: str, before: ServerCounts, written: int) -> ServerCounts:
    """What was counted since `before`, once all of `written` tokens are in: counters follow answers by a moment."""
    found = read(url) - before
    for _ in range(PAUSES):
        if found.written >= written:
            break
        time.sleep(PAUSE)
        found = read(url) - before
    return found
