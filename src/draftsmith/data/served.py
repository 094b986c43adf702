"""Answers from a server that speaks OpenAI's completions protocol (vLLM, SGLang, llama.cpp), in place of the local one.

The chat template is rendered here, once, and prompts are sent as token ids, so a server reads exactly what the local
target would. Token ids are asked for too: text that is tokenised again drifts from the tokens that were sampled. Where
a server sends none, answers are marked inexact and the drift is measured and said.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import httpx
from pydantic import Field, field_validator

from draftsmith.data.replies import Asked, ServedAnswer, Tally, cut, garbage, read
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Json = dict[str, Any]

FIRST_DELAY = 0.5  # seconds before the first retry; doubled for each further one
LONGEST_DELAY = 30.0
CONNECT_TIMEOUT = 10.0
SEED_BITS = 31  # what every server takes for a seed


class ServerOptions(Options):
    """A server that writes the answers."""

    url: str = Field(description="where it listens, for instance http://localhost:8000")
    model: str | None = Field(default=None, description="the model's name there; the first that it lists if not given")
    concurrency: int = Field(default=32, ge=1, description="requests in flight at most")
    retries: int = Field(default=5, ge=0, description="how often a request that failed is sent again")
    timeout: float = Field(default=120.0, gt=0.0, description="seconds that an answer may take")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the API key")

    @field_validator("url")
    @classmethod
    def _base(cls, url: str) -> str:
        """The address without what the protocol adds to it."""
        base = url.rstrip("/").removesuffix("/v1").rstrip("/")
        try:
            parsed = httpx.URL(base)
        except httpx.InvalidURL as problem:
            raise ValueError(f"{url!r} is no address: {problem}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is no address of a server; wanted one such as http://localhost:8000")
        return base


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its server lists it.

    Attributes:
        name: what requests call it.
        longest: tokens of prompt and answer together that the server takes, if it says so.
        llama_cpp: the server is llama.cpp's, whose parameters have other names.
    """

    name: str
    longest: int | None = None
    llama_cpp: bool = False


def served_model(options: ServerOptions) -> ServedModel:
    """The model that will answer, as GET /v1/models lists it.

    Raises:
        UserError: the server can't be reached, refuses, has no such model, or does not speak the protocol.
    """

    async def work(emit: Callable[[ServedModel], None]) -> None:
        async with _http(options) as http:
            emit(await _Server(options, http).model())

    with closing(_streamed(work)) as found:
        return next(found)


def answer(
    options: ServerOptions,
    asked: Sequence[Asked],
    sampling: Sampling,
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    tally: Tally | None = None,
) -> Iterator[ServedAnswer]:
    """The server's answers, each as soon as it is there (not in the order of `asked`).

    A request's seed depends on `sampling.seed` and its name alone. An answer ends at the first of `eos_ids`; where the
    server says that it ended but sends no end token, the one it names, or the tokenizer's, is appended.

    Args:
        tally: counts the answers for a caller that reports over several calls; without it, this call warns at its end
            of answers that are not the sampled tokens.

    Raises:
        UserError: as `served_model`; a request is refused (the server's words are shown) or fails after all retries;
            an answer can't be read or holds tokens that the target has not; `sampling` has what no server applies.
    """
    _check(sampling)
    counts = Tally() if tally is None else tally

    async def work(emit: Callable[[tuple[Asked, Json]], None]) -> None:
        async with _http(options) as http:
            server = _Server(options, http)
            model = await server.model()
            waiting = iter(asked)

            async def worker() -> None:
                for question in waiting:
                    body = request_body(model, question, sampling, max_new_tokens)
                    emit((question, await server.call("POST", "/v1/completions", question.request, body)))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(options.concurrency, len(asked))):
                        group.create_task(worker())
            except BaseExceptionGroup as problems:
                raise problems.exceptions[0] from None

    if asked:
        with closing(_streamed(work)) as replies:
            for question, reply in replies:
                yield read(options.url, question, reply, tokenizer, eos_ids, counts)
    if tally is None:
        counts.report()


def request_body(model: ServedModel, question: Asked, sampling: Sampling, max_new_tokens: int) -> Json:
    """The body of POST /v1/completions. All of `sampling` is said: servers' defaults differ from the target's own."""
    room = [max_new_tokens, question.room]
    if model.longest is not None:
        # a prompt that leaves no room is sent all the same: the server says it better
        room.append(max(model.longest - len(question.prompt_ids), 1))
    body: Json = {
        "model": model.name,
        "prompt": question.prompt_ids,
        "max_tokens": min(tokens for tokens in room if tokens is not None),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,  # off, for all three servers
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": request_seed(sampling.seed, question.request),
        "return_token_ids": True,
    }
    if model.llama_cpp:
        body |= {
            "repeat_penalty": sampling.repetition_penalty,
            # all of the sequence: it refuses -1, its earlier word for that
            "repeat_last_n": len(question.prompt_ids) + body["max_tokens"],
            # transformers' order; llama.cpp's own applies the temperature last
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "return_tokens": True,
            "n_probs": 1,  # the ids come with the probabilities where they come in no other way
        }
    return body


def request_seed(seed: int, request: int | str) -> int:
    """A request's own seed of 31 bits."""
    return seeding.key("served", seed, request) >> (63 - SEED_BITS)


def _check(sampling: Sampling) -> None:
    for name, used in (
        ("no_repeat_ngram_size", sampling.no_repeat_ngram_size > 0),
        ("suppress_tokens", bool(sampling.suppress_tokens)),
    ):
        if used:
            raise UserError(f"a server does not apply sampling.{name}: leave it out, or let the local target answer")


def _http(options: ServerOptions) -> httpx.AsyncClient:
    headers = {}
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env)
        if not key:
            raise UserError(f"the environment variable {options.api_key_env} (server.api_key_env) holds no API key")
        headers["Authorization"] = f"Bearer {key}"
    return httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(options.timeout, connect=min(CONNECT_TIMEOUT, options.timeout), pool=None),
        limits=httpx.Limits(max_connections=options.concurrency),
    )


class _Server:
    """Requests with retries, and errors in words."""

    def __init__(self, options: ServerOptions, http: httpx.AsyncClient) -> None:
        self._options, self._http = options, http

    async def model(self) -> ServedModel:
        listing = await self.call("GET", "/v1/models", "models")
        cards = listing.get("data")
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise garbage(f"{self._options.url}/v1/models", str(listing))
        wanted = self._options.model
        card = next((card for card in cards if wanted in (None, card["id"])), None)
        if card is None:
            names = ", ".join(card["id"] for card in cards) or "none"
            missing = "no model" if wanted is None else f"no model {wanted!r}"
            raise UserError(f"{self._options.url} has {missing}; its models: {names} (server.model)")
        longest = card.get("max_model_len")
        return ServedModel(
            card["id"], longest if type(longest) is int else None, llama_cpp=card.get("owned_by") == "llamacpp"
        )

    async def call(self, method: str, path: str, request: int | str, body: Json | None = None) -> Json:
        """The server's JSON. What may pass (429, 5xx, a broken connection) is tried again, later and later."""
        url = self._options.url + path
        for attempt in range(self._options.retries + 1):
            wait = _delay(request, attempt)
            try:
                response = await self._http.request(method, url, json=body)
            except httpx.TransportError as failure:
                problem = " ".join(f"{type(failure).__name__} {failure}".split())
                if isinstance(failure, httpx.ReadTimeout):
                    problem = f"nothing within {self._options.timeout:g} s (server.timeout)"
                elif body is None and isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
                    # the first contact: a wrong address is likelier than a server that is about to come back
                    raise UserError(f"no server can be reached at {url} ({problem}): is it running there?") from None
            else:
                if response.is_success:
                    return _object(url, response)
                problem = f"status {response.status_code}: {_message(response)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise UserError(f"{url} refuses request {request!r}, {problem}{self._hint(response.status_code)}")
                wait = max(wait, _asked_delay(response))
            if attempt < self._options.retries:
                await asyncio.sleep(wait)
        tries = f"{self._options.retries + 1} tries" if self._options.retries else "one try"
        raise UserError(
            f"{url} does not answer request {request!r} after {tries}; the last: {problem}. Look at the server, or ask "
            "less of it at a time (server.concurrency)"
        )

    def _hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        name = self._options.api_key_env
        return f"; the API key sent is that in {name}" if name else "; no API key was sent (server.api_key_env)"


def _delay(request: int | str, attempt: int) -> float:
    """Seconds before the next try: doubling, and keyed between half and one and a half times that."""
    jitter = 0.5 + seeding.key("retry", request, attempt) / 2.0**63
    return min(FIRST_DELAY * 2.0**attempt, LONGEST_DELAY) * jitter


def _asked_delay(response: httpx.Response) -> float:
    """Seconds that the server asks to wait (Retry-After), within reason."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), LONGEST_DELAY) if asked.isdecimal() else 0.0


def _object(url: str, response: httpx.Response) -> Json:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise garbage(url, response.text)
    return cast(Json, found)


def _message(response: httpx.Response) -> str:
    """A refusal in the server's words: `error.message`, `message` or `detail` of its JSON, else all it said."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if isinstance(found, dict):
        inner = found.get("error", found)
        said = (
            next((inner[k] for k in ("message", "detail") if k in inner), inner) if isinstance(inner, dict) else inner
        )
        return cut(str(said))
    return cut(response.text) or response.reason_phrase


def _streamed(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Generator[T]:
    """What `work` emits, as it does. Its loop has a thread of its own: requests go on while the caller is busy, and the
    caller may have a running loop (a notebook has). Closing the iterator cancels the work."""
    outbox: queue.SimpleQueue[tuple[T, ...]] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(lambda item: outbox.put((item,))))
    task.add_done_callback(lambda _: outbox.put(()))

    def run() -> None:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())

    thread = threading.Thread(target=run, name="draftsmith-served", daemon=True)
    thread.start()
    try:
        while item := outbox.get():
            yield item[0]
        task.result()
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
