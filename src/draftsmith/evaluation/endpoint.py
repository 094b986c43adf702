"""A server (vLLM, SGLang, or another of OpenAI's completions protocol) as a peer: timed from outside, its speculative
counters read before and after each prompt.

Prompts are sent as token ids. vLLM's `/metrics` counts drafts, drafted and accepted tokens and acceptances at each
position; a prompt's share is the difference, which holds while nobody else uses the server and one prompt is decoded at
a time. From it the rounds are written down in an order of our own, for the counters have none. SGLang counts its verify
passes alone (with --enable-metrics; its acceptance figures are means over an interval): what they accepted is what is
left of the answer's tokens, spread evenly, so its acceptance by depth says nothing. Where a server counts nothing, or
prompts are decoded together, a round is what it streamed at once: vLLM and SGLang send a round's tokens together, but a
client that is too slow sees two rounds as one, and how many tokens were drafted is not told.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from draftsmith.data import replies
from draftsmith.data.replies import Asked, Tally
from draftsmith.data.served import ServedModel, ServerOptions, request_body, served_model
from draftsmith.decoding.trace import Generation, Round
from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.modes import Decoded, Maker
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling

SETTLED = 0.05  # seconds between two readings of the counters that have to agree
PATIENCE = 20  # readings at most
_LINE = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})?\s+(\S+)$")
_SGLANG = re.compile(r"^sglang:spec_(verify_calls_total|num_draft_tokens)(?:\{.*\})?\s+(\S+)$")
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """A server's speculative counters: drafts, drafted and accepted tokens, acceptances at each position.

    `accepted_told` is False where the server counts its rounds and not what they accepted (SGLang).
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    at_position: tuple[int, ...] = ()
    accepted_told: bool = True

    def __sub__(self, before: Counters) -> Counters:
        held = (*before.at_position, *[0] * len(self.at_position))
        at = tuple(a - b for a, b in zip(self.at_position, held, strict=False))
        drafts, drafted, accepted = self.drafts - before.drafts, self.drafted - before.drafted, self.accepted
        return Counters(drafts, drafted, accepted - before.accepted, at, self.accepted_told)

    def over(self, tokens: int) -> Counters:
        """These counters for an answer of `tokens` tokens, its first the prefill's: what was accepted is filled in."""
        if self.accepted_told or not self.drafts:
            return self
        return even_counters(self.drafted, max(0, tokens - 1 - self.drafts), tokens)


def read_counters(text: str) -> Counters | None:
    """The counters in a `/metrics` page, summed over engines and models; None where there are none."""
    totals = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    at: dict[int, float] = {}
    seen = False
    for line in text.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        if name in totals:
            totals[name] += value
            seen = True
        elif name == "accepted_tokens_per_pos" and (position := _POSITION.search(labels)):
            at[int(position[1])] = at.get(int(position[1]), 0.0) + value
    if not seen:
        return _verify_calls(text)
    places = range(max(at, default=-1) + 1)
    return Counters(
        drafts=int(totals["drafts"]),
        drafted=int(totals["draft_tokens"]),
        accepted=int(totals["accepted_tokens"]),
        at_position=tuple(int(at.get(i, 0)) for i in places),
    )


def _verify_calls(text: str) -> Counters | None:
    """SGLang's passes, and the nodes of each (the gauge counts the root, which is no draft)."""
    found: dict[str, list[float]] = {}
    for match in filter(None, map(_SGLANG.match, text.splitlines())):
        found.setdefault(match[1], []).append(float(match[2]))
    if not (calls := found.get("verify_calls_total")):
        return None
    nodes = max(0, int(max(found.get("num_draft_tokens", [0.0]))) - 1)
    return Counters(int(sum(calls)), int(sum(calls)) * nodes, accepted_told=False)


def even_counters(drafted: int, accepted: int, tokens: int) -> Counters:
    """Counters with these totals over an answer of `tokens` tokens, the accepted ones spread evenly over its rounds."""
    drafts = max(1, tokens - 1 - accepted)
    depth, more = divmod(accepted, drafts)
    return Counters(drafts, drafted, accepted, (*[drafts] * depth, more))


def rounds_of(counters: Counters, tokens: int, context: int, milliseconds: float, by_depth: bool = True) -> list[Round]:
    """Rounds with these counts, for an answer of `tokens` tokens of which the first is the prefill's.

    `by_depth`: the acceptances at each position were counted; else the rounds hold only what is known in total, and
    tell of no refusal.

    Rounds in which the server drafted nothing are in no counter: they are what is left of the tokens. What was
    committed beyond the answer's end is cut from the last rounds.
    """
    at = [counters.drafts, *counters.at_position]
    exactly = [max(0, a - b) for a, b in zip(at, [*at[1:], 0], strict=True)]
    accepted = [depth for depth, times in enumerate(exactly) for _ in range(times)]
    size, larger = divmod(counters.drafted, max(1, len(accepted)))
    nodes = [max(a, size + (i >= len(accepted) - larger)) for i, a in enumerate(accepted)]
    bare = max(0, tokens - 1 - sum(a + 1 for a in accepted))
    shapes = [*[(0, 0)] * bare, *zip(accepted, nodes, strict=True)]
    left, place, rounds = tokens - 1, context + 1, []
    for depth, drafted in shapes:
        kept = min(left, depth + 1)
        reached = min(depth + 1, drafted) if by_depth else depth
        share = milliseconds / len(shapes)
        rounds.append(_round(drafted, reached, depth, kept, place, share))
        left, place = left - kept, place + kept
    return rounds


class EndpointMode:
    """A server by its address.

    Args:
        name: of the mode.
        options: address and model; the model is asked for at once.
        target: whose tokenizer reads the answers.
        against: the mode that speed-ups are over: another server without speculation, if one is measured.

    Raises:
        UserError: the server can't be reached or does not speak the protocol.
    """

    engine: Maker = "server"
    node_budget: int | None = None

    def __init__(self, name: str, options: ServerOptions, target: HFTarget, against: str = PLAIN) -> None:
        self.name = name
        self.against = against
        self.target = target
        self.options = options
        self.model: ServedModel = served_model(options)
        self._http = httpx.Client(timeout=httpx.Timeout(options.timeout, connect=10.0))

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        """The server's answers; a batch is sent at once."""
        room = self.target.spec.max_positions
        asked = [
            Asked(b, list(p), r, min(max_new_tokens, room - len(p)))
            for b, (p, r) in enumerate(zip(prompts, requests, strict=True))
        ]
        if len(asked) > 1:
            started = time.perf_counter()
            with ThreadPoolExecutor(len(asked)) as pool:
                found = list(pool.map(lambda a: self._ask(a, sampling, max_new_tokens), asked))
            # as in the engine, each gets its share of the time, so that sums are wall-clock time
            share = (time.perf_counter() - started) * 1e3 / len(asked)
            for decoded in found:
                g = decoded.generation
                g.prefill_ms, g.total_ms = g.prefill_ms * share / max(g.total_ms, 1e-9), share
            return found
        before = self._counters()
        decoded = self._ask(asked[0], sampling, max_new_tokens)
        if before is not None and (after := self._settled()) is not None:
            g = decoded.generation
            spent = max(0.0, g.total_ms - g.prefill_ms)
            counted = (after - before).over(len(g.token_ids))
            g.rounds = rounds_of(counted, len(g.token_ids), len(prompts[0]), spent)
        return [decoded]

    def _ask(self, question: Asked, sampling: Sampling, max_new_tokens: int) -> Decoded:
        body = request_body(self.model, question, sampling, max_new_tokens)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body.pop("n_probs", None)  # probabilities cost time, and their ids are not what a stream is read for
        heard = _Heard()
        started = time.perf_counter()
        for piece in self._pieces(body):
            heard.take(piece, (time.perf_counter() - started) * 1e3)
        total = (time.perf_counter() - started) * 1e3
        spec = self.target.spec
        answer = replies.read(self.options.url, question, heard.reply(), self.target.tokenizer, spec.eos_ids, Tally())
        ids = answer.token_ids
        first_ms = heard.times[0] if heard.times else total
        finish: Literal["stop", "length"] = "stop" if answer.complete else "length"
        if heard.drafted:
            counted = even_counters(heard.drafted, heard.accepted, len(ids))
            spent = max(0.0, total - first_ms)
            rounds = rounds_of(counted, len(ids), len(question.prompt_ids), spent, by_depth=False)
        else:
            rounds = heard.rounds(len(question.prompt_ids), len(ids))
        generation = Generation(question.index, ids, finish, rounds, first_ms, total)
        # which tokens were drafted is not told
        return Decoded(generation, [-1] * len(ids), [0] * len(ids), first_ms)

    def _pieces(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        url = f"{self.options.url}/v1/completions"
        try:
            with self._http.stream("POST", url, json=body) as response:
                if not response.is_success:
                    said = replies.cut(response.read().decode(errors="replace"))
                    raise UserError(f"{url} refuses a request, status {response.status_code}: {said}")
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    try:
                        piece = json.loads(data)
                    except ValueError:
                        raise replies.garbage(url, data) from None
                    if not isinstance(piece, dict) or "error" in piece:
                        raise replies.garbage(url, data)
                    yield piece
        except httpx.TransportError as problem:
            raise UserError(f"{url} broke off ({type(problem).__name__} {problem}): is the server running?") from None

    def _counters(self) -> Counters | None:
        try:
            response = self._http.get(f"{self.options.url}/metrics")
        except httpx.TransportError:
            return None
        return read_counters(response.text) if response.is_success else None

    def _settled(self) -> Counters | None:
        """The counters once they stand still: a server counts its last round after it has sent it."""
        found = self._counters()
        for _ in range(PATIENCE):
            time.sleep(SETTLED)
            found, before = self._counters(), found
            if found == before:
                break
        return found


@dataclass
class _Heard:
    """What a stream said: text, token ids, and when pieces with tokens came."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    drafted: int = 0
    accepted: int = 0

    def take(self, piece: dict[str, Any], now: float) -> None:
        self.usage = piece.get("usage") or self.usage
        if isinstance(timings := piece.get("timings"), dict):  # llama.cpp's, in its last piece
            self.drafted, self.accepted = (int(timings.get(n) or 0) for n in ("draft_n", "draft_n_accepted"))
        for choice in piece.get("choices") or []:
            ids = next((choice[n] for n in replies.ID_FIELDS if isinstance(choice.get(n), list)), None)
            if choice.get("text") or ids:
                self.texts.append(choice.get("text") or "")
                self.ids += ids or []
                self.sizes.append(len(ids) if ids else 1)
                self.times.append(now)
            self.last |= {name: value for name, value in choice.items() if value is not None}

    def reply(self) -> dict[str, Any]:
        """The answer as if it had not been streamed."""
        choice = {k: v for k, v in self.last.items() if k not in ("text", *replies.ID_FIELDS)}
        choice |= {"text": "".join(self.texts)} | ({"token_ids": self.ids} if self.ids else {})
        return {"choices": [choice]} | ({"usage": self.usage} if self.usage else {})

    def rounds(self, context: int, tokens: int) -> list[Round]:
        """A round for each piece after the first."""
        found, left = [], tokens - (self.sizes[0] if self.sizes else 0)
        place = context + tokens - left
        for size, now, before in zip(self.sizes[1:], self.times[1:], self.times, strict=False):
            kept = max(0, min(size, left))
            found.append(_round(size - 1, size - 1, size - 1, kept, place, now - before))
            left, place = left - kept, place + kept
        return found


def _round(nodes: int, reached: int, accepted: int, kept: int, context: int, milliseconds: float) -> Round:
    return Round(0, nodes, reached, accepted, accepted + 1, kept, (0,) * accepted, context, 0.0, 0.0, milliseconds)
