"""Answers from a real little server: requests, retries, errors, concurrency, seeds."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from pydantic import ValidationError
from tests.unit.data.serving import EOS, TOKENIZER, Json, Reply, Script, answers, asked, completion, encode

from draftsmith.data import served
from draftsmith.data.replies import Asked, ServedAnswer
from draftsmith.data.served import ServerOptions, answer, served_model
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling


def test_prompts_go_as_ids_and_all_of_the_sampling_is_said(server: Script) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=3)
    options = ServerOptions(url=f"{server.url}/v1/", model="large")
    questions = [Asked(0, [4, 5, 6], "a"), Asked(1, [7], "b", room=2)]
    assert len(list(answer(options, questions, sampling, 16, TOKENIZER, EOS))) == 2
    first, second = sorted(server.bodies, key=lambda body: body["prompt"])
    assert first.pop("seed") != second.pop("seed")
    assert first == {
        "model": "large",
        "prompt": [4, 5, 6],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_k": -1,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "return_token_ids": True,
    }
    assert second["max_tokens"] == 2


def test_what_no_server_applies_is_refused(server: Script) -> None:
    for sampling in (Sampling(no_repeat_ngram_size=3), Sampling(suppress_tokens=(1,))):
        with pytest.raises(UserError, match="a server does not apply sampling."):
            answers(server, sampling=sampling)


def test_the_servers_longest_sequence_bounds_the_answer_and_llama_cpp_has_its_own_names(server: Script) -> None:
    server.models = (200, {"data": [{"id": "m", "max_model_len": 10, "owned_by": "llamacpp"}]})
    answers(server)
    (body,) = server.bodies
    assert body["max_tokens"] == 7
    assert (body["n_probs"], body["return_tokens"], body["repeat_last_n"]) == (1, True, 3 + 7)
    assert body["samplers"].index("temperature") < body["samplers"].index("top_p")
    assert served_model(ServerOptions(url=server.url)) == served.ServedModel("m", 10, llama_cpp=True)


def test_seeds_differ_by_request_and_are_the_same_in_every_run(server: Script) -> None:
    def seeds(seed: int) -> dict[int, int]:
        server.bodies.clear()
        answers(server, 20, Sampling(temperature=1.0, seed=seed), concurrency=4)
        return {body["prompt"][0]: body["seed"] for body in server.bodies}

    first = seeds(1)
    assert len(set(first.values())) == 20
    assert all(0 <= seed < 2**31 for seed in first.values())
    assert any(seed >= 2**30 for seed in first.values())
    assert seeds(1) == first
    assert not set(seeds(2).values()) & set(first.values())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(server: Script, status: int) -> None:
    def complete(body: Json, tries: int) -> Reply:
        if tries < 2:
            return status, {"error": {"message": "busy"}}
        return 200, completion("ok", ids=encode("ok"))

    server.complete = complete
    assert [a.index for a in answers(server, 3, retries=2)] == [0, 1, 2]
    assert len(server.bodies) == 9
    by_prompt = {body["prompt"][0]: body["seed"] for body in server.bodies}
    assert all(body["seed"] == by_prompt[body["prompt"][0]] for body in server.bodies)


def test_a_broken_connection_is_tried_again(server: Script) -> None:
    # fewer bytes than were promised
    server.complete = lambda body, tries: (
        (200, completion("ok", ids=encode("ok"))) if tries else (200, "{", {"content-length": "50"})
    )
    assert len(answers(server)) == 1
    assert len(server.bodies) == 2


def test_it_gives_up_after_all_retries_and_says_what_the_server_said(server: Script) -> None:
    server.complete = lambda *_: (503, {"error": {"message": "out of memory"}})
    with pytest.raises(UserError, match="'r0' after 3 tries; the last: status 503: out of memory") as caught:
        answers(server, retries=2)
    assert server.url in str(caught.value)
    assert len(server.bodies) == 3


def test_retries_wait_longer_and_longer_and_as_long_as_they_are_asked_to(
    server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "FIRST_DELAY", 1.0)
    waits = [served._delay("a", attempt) for attempt in range(10)]
    for attempt, wait in enumerate(waits):
        assert 0.5 <= wait / min(2.0**attempt, served.LONGEST_DELAY) <= 1.5
    assert waits == [served._delay("a", attempt) for attempt in range(10)]
    assert served._delay("b", 0) != waits[0]

    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    server.complete = lambda body, tries: (
        (200, completion("ok", ids=encode("ok")))
        if tries > 1
        else (429, "slowly", {"retry-after": "7"} if tries else {})
    )
    answers(server)
    assert slept == [served._delay("r0", 0), 7.0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"error": {"message": "prompt too long"}}, "prompt too long"),  # vLLM, OpenAI, llama.cpp
        ({"object": "error", "message": "prompt too long"}, "prompt too long"),  # SGLang
        ({"detail": "Not Found"}, "Not Found"),
        ("<h1>Bad\n gateway</h1>", "<h1>Bad gateway</h1>"),
    ],
)
def test_a_refusal_is_shown_and_not_tried_again(server: Script, reply: Json | str, said: str) -> None:
    server.complete = lambda *_: (400, reply)
    with pytest.raises(UserError, match=f"status 400: {said}") as caught:
        answers(server)
    assert server.url in str(caught.value)
    assert len(server.bodies) == 1


def test_the_model_is_the_first_listed_or_the_one_named(server: Script) -> None:
    assert served_model(ServerOptions(url=server.url)).name == "small"
    answers(server)
    answers(server, model="large")
    assert [body["model"] for body in server.bodies] == ["small", "large"]
    with pytest.raises(UserError, match="no model 'huge'; its models: small, large"):
        answers(server, model="huge")
    server.models = (200, {"data": []})
    with pytest.raises(UserError, match="has no model; its models: none"):
        answers(server)
    for garbage in ("hello", {"models": ["a"]}, {"data": ["a"]}):
        server.models = (200, garbage)
        with pytest.raises(UserError, match="/v1/models answers with something that is not of OpenAI's protocol"):
            answers(server)
    assert len(server.bodies) == 2


def test_a_server_that_cannot_be_reached_is_named_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no server can be reached at {url}/v1/models"):
            served_model(ServerOptions(url=url))


def test_a_server_that_takes_too_long_is_given_up(server: Script) -> None:
    release = threading.Event()

    def complete(body: Json, tries: int) -> Reply:
        release.wait(20)
        return 200, completion("ok", ids=encode("ok"))

    server.complete = complete
    try:
        with pytest.raises(UserError, match="after one try; the last: nothing within 0.2 s"):
            answers(server, retries=0, timeout=0.2)
    finally:
        release.set()


def test_no_more_requests_are_in_flight_than_allowed_and_that_many_are(server: Script) -> None:
    lock = threading.Lock()
    full = threading.Barrier(3)
    flying = most = 0

    def complete(body: Json, tries: int) -> Reply:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        full.wait(20)  # passes only when three are here together
        with lock:
            flying -= 1
        return 200, completion("ok", ids=encode("ok"))

    server.complete = complete
    assert len(answers(server, 12, concurrency=3)) == 12
    assert most == 3


def test_answers_come_as_they_are_ready(server: Script) -> None:
    last_is_here = threading.Event()

    def complete(body: Json, tries: int) -> Reply:
        if body["prompt"][0] == 0:
            last_is_here.wait(20)
        return 200, completion("ok", ids=encode("ok"))

    server.complete = complete
    order = []
    for found in answer(ServerOptions(url=server.url, concurrency=2), asked(4), Sampling(), 16, TOKENIZER, EOS):
        order.append(found.index)
        if len(order) == 3:
            last_is_here.set()
    assert order[-1] == 0
    assert sorted(order) == [0, 1, 2, 3]


def test_a_caller_that_stops_early_cancels_what_is_waiting(server: Script) -> None:
    running = answer(ServerOptions(url=server.url, concurrency=1), asked(500), Sampling(), 16, TOKENIZER, EOS)
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert 1 <= len(server.bodies) < 500
    assert not [t for t in threading.enumerate() if t.name == "draftsmith-served"]


def test_it_works_inside_a_running_loop(server: Script) -> None:
    async def notebook() -> list[ServedAnswer]:
        return answers(server)

    assert len(asyncio.run(notebook())) == 1


def test_the_api_key_comes_from_the_environment(server: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "abc")
    answers(server, api_key_env="SOME_KEY")
    answers(server)
    sent = [{k.lower(): v for k, v in headers.items()}.get("authorization") for headers in server.headers]
    assert sent == ["Bearer abc", None]
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match="SOME_KEY"):
        answers(server, api_key_env="SOME_KEY")
    server.models = (401, {"error": "who are you"})
    with pytest.raises(UserError, match="status 401: who are you; no API key was sent"):
        answers(server)


def test_nothing_asked_asks_nobody() -> None:
    assert list(answer(ServerOptions(url="http://127.0.0.1:1"), [], Sampling(), 16, TOKENIZER, EOS)) == []


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="no address"):
        ServerOptions(url=url)
