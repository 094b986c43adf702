"""What a server answered: its tokens wherever it puts them, ends, and how far the text drifts from them."""

from __future__ import annotations

import pytest
from tests.unit.data.serving import END, EOS, OTHER_END, TOKENIZER, Json, Script, answers, asked, completion, encode
from tests.unit.target.tokenizers_for_tests import byte_tokenizer
from tokenizers import normalizers

from draftsmith.data.replies import ServedAnswer, Tally
from draftsmith.data.served import ServerOptions, answer
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling


def test_returned_ids_are_taken_as_they_are(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    # "the" has a token of its own: these are ids that its text does not give back
    apart = [*encode("t"), *encode("h"), *encode("e")]
    assert apart != encode("the")
    replies = {
        0: completion("the", ids=[*apart, END]),
        1: completion("yes", "length", ids=encode("yes")),
        2: completion("no", ids=[*encode("no"), OTHER_END]),
    }
    server.complete = lambda body, _: (200, replies[body["prompt"][0]])
    tally = Tally()
    assert answers(server, 3, tally=tally) == [
        ServedAnswer(0, [*apart, END], True, True, "the"),
        ServedAnswer(1, encode("yes"), False, True, "yes"),
        ServedAnswer(2, [*encode("no"), OTHER_END], True, True, "no"),
    ]
    assert (tally.answers, tally.without_ids, tally.drifted) == (3, 0, 1)
    assert tally.drift == pytest.approx(1 / 3)
    tally.report()
    assert capsys.readouterr().err == ""


def test_a_missing_end_token_is_appended_and_what_follows_one_is_dropped(server: Script) -> None:
    replies = {
        0: completion("a", ids=encode("a")),
        1: completion("a", ids=encode("a"), stop_reason=OTHER_END),
        2: completion("a", ids=encode("a"), matched_stop=OTHER_END),
        3: completion("ab", "length", ids=[*encode("a"), END, *encode("b")]),
        4: completion("", ids=[]),
        5: completion("a", ids=encode("a"), stop_reason=7),  # a stop of the server's own is none of the target's ends
    }
    server.complete = lambda body, _: (200, replies[body["prompt"][0]])
    found = answers(server, 6)
    assert [a.token_ids[len(encode("a")) :] for a in found[:4]] == [[END], [OTHER_END], [OTHER_END], [END]]
    assert found[4].token_ids == [END]
    assert found[5].token_ids == [*encode("a"), END]
    assert all(a.complete and a.exact for a in found)


@pytest.mark.parametrize("place", ["choice tokens", "choice output_ids", "reply", "verbose", "probabilities"])
def test_ids_are_found_wherever_a_server_puts_them(server: Script, place: str) -> None:
    ids = [*encode("t"), *encode("h"), END]
    reply = completion("th") | {"usage": {"completion_tokens": 3, "prompt_tokens": 3}}
    if place.startswith("choice"):
        reply["choices"][0][place.split()[1]] = ids
    elif place == "reply":
        reply["tokens"] = ids
    elif place == "verbose":
        reply["__verbose"] = {"tokens": ids}
    else:
        reply["choices"][0]["logprobs"] = {"content": [{"id": i, "token": "?"} for i in ids]}
    server.complete = lambda *_: (200, reply)
    assert answers(server) == [ServedAnswer(0, ids, True, True, "th")]


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"tokens": []},  # llama.cpp's, where they were not asked for
        {"tokens": ["t", "h"]},
        {"logprobs": {"content": [{"id": 1}]}},  # fewer than the server counts: it left some out
        {"logprobs": {"tokens": ["t", "h"], "content": None}},
    ],
)
def test_text_without_ids_is_tokenised_again_and_said_to_be_inexact(
    server: Script, choice: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    server.complete = lambda *_: (200, completion("the end", **choice) | {"usage": {"completion_tokens": 4}})
    assert answers(server) == [ServedAnswer(0, [*encode("the end"), END], True, False, "the end")]
    warning = capsys.readouterr().err
    assert "1 of 1 answers came without token ids" in warning
    assert "at least 0.0%" in warning


def test_drift_is_measured_where_it_can_be(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    apart = [*encode("t"), *encode("h")]
    replies = {
        0: completion("th", ids=[*apart, END]),
        1: completion("no", ids=[*encode("no"), END]),
        2: completion("no", "length", ids=encode("no")),
        3: completion("yes"),
    }
    server.complete = lambda body, _: (200, replies[body["prompt"][0]])
    answers(server, 4)
    warning = capsys.readouterr().err
    assert "1 of 4 answers came without token ids" in warning
    assert "changes 1 of the 3 with ids (33.3%)" in warning


def test_without_any_ids_texts_that_tokens_cannot_spell_bound_the_drift(server: Script) -> None:
    tokenizer = byte_tokenizer(None)
    # a normaliser makes one text of two, as some real tokenizers have
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    texts = {0: "Yes", 1: "yes"}
    server.complete = lambda body, _: (200, completion(texts[body["prompt"][0]]))
    tally = Tally()
    options = ServerOptions(url=server.url)
    found = list(answer(options, asked(2), Sampling(), 16, tokenizer, EOS, tally))
    assert not any(a.exact for a in found)
    assert (tally.without_ids, tally.unstable, tally.drift) == (2, 1, 0.5)


def test_a_tokenizer_that_is_not_the_servers_is_noticed(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.complete = lambda *_: (200, completion("yes", ids=encode("no")))
    answers(server)
    assert "is the target's tokenizer the one that the server uses?" in capsys.readouterr().err
    server.complete = lambda *_: (200, completion("yes", ids=[7, len(TOKENIZER)]))
    with pytest.raises(UserError, match=f"'r0' with token {len(TOKENIZER)}"):
        answers(server)


def test_a_server_that_reads_other_prompts_is_noticed(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    reply = completion("ok", ids=encode("ok"))
    server.complete = lambda body, _: (200, reply | {"usage": {"prompt_tokens": 3 + (body["prompt"][0] == 0)}})
    answers(server, 3)
    assert "for 1 of 3 prompts the server counted other tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reply",
    [
        "not JSON",
        "[1]",
        {"choices": []},
        {"choices": [{"message": {"content": "chat"}}]},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "a", "finish_reason": "abort"}]},
    ],
)
def test_what_is_no_completion_is_refused(server: Script, reply: Json | str) -> None:
    server.complete = lambda *_: (200, reply)
    with pytest.raises(UserError, match="/v1/completions answers with something that is not of OpenAI's protocol"):
        answers(server)
    assert len(server.bodies) == 1
