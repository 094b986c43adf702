"""A real little streaming server with vLLM's counters: answers, first token, rounds; and counters by hand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.talking import answers, conversation, talking_target

from draftsmith.data.served import ServerOptions
from draftsmith.evaluation import endpoint
from draftsmith.evaluation.bench import BenchOptions, bench, results
from draftsmith.evaluation.endpoint import Counters, EndpointMode, read_counters, rounds_of
from draftsmith.evaluation.metrics import count_rounds, vllm
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling

PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} %d
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} %d
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} %d
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} %d
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} %d
vllm:num_requests_running{engine="0",model_name="m"} 0.0
"""


def test_counters_are_read_from_the_page() -> None:
    found = read_counters(PAGE % (10, 20, 9, 6, 3))
    assert found == Counters(10, 20, 9, (6, 3))
    assert read_counters("vllm:num_requests_running 0.0\n") is None
    assert read_counters(PAGE % (10, 20, 9, 6, 3) + PAGE.replace('engine="0"', 'engine="1"') % (1, 2, 1, 1, 0)) == (
        Counters(11, 22, 10, (7, 3))
    )
    assert Counters(10, 20, 9, (6, 3)) - Counters(4, 8, 3, (2, 1)) == Counters(6, 12, 6, (4, 2))
    assert Counters(3, 6, 2, (1, 1)) - Counters() == Counters(3, 6, 2, (1, 1))


def test_sglang_counts_its_passes_alone() -> None:
    page = """# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{engine_type="unified",model_name="m"} %d
sglang:spec_num_draft_tokens{engine_type="unified",model_name="m"} 4.0
sglang:spec_accept_length{model_name="m"} 2.5
"""
    before, after = (read_counters(page % calls) for calls in (40, 47))
    assert before is not None
    assert after is not None
    assert (after.drafts, after.drafted, after.accepted_told) == (47, 141, False)
    # 7 passes of 3 drafted tokens wrote 19 of an answer's 20 tokens: 12 were accepted
    counts = count_rounds(rounds_of((after - before).over(20), 20, 7, 70.0))
    assert (counts.rounds, counts.committed, counts.kept, counts.drafted) == (7, 19, 19, 21)
    assert counts.acceptance_length == pytest.approx(19 / 7)
    # no speculation: a pass a token; a server that does not say how many it drafts
    assert count_rounds(rounds_of(Counters(accepted_told=False).over(5), 5, 7, 1.0)).acceptance_length == 1.0
    silent = read_counters("sglang:spec_verify_calls_total 7.0\n")
    assert silent == Counters(7, 0, accepted_told=False)
    assert count_rounds(rounds_of(silent.over(20), 20, 7, 70.0)).committed == 19


def test_rounds_have_the_counters_counts() -> None:
    # 5 drafts of 2: two accepted none, one accepted 1, two accepted 2; committed 5 + 5 = 10
    counters = Counters(5, 10, 5, (3, 2))
    rounds = rounds_of(counters, tokens=11, context=7, milliseconds=50.0)
    counts = count_rounds(rounds)
    assert (counts.rounds, counts.committed, counts.kept, counts.drafted) == (5, 10, 10, 10)
    assert counts.accepted_at_depth == (3, 2)
    assert counts.offered_at_depth == (5, 3)
    assert vllm(counts) == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 0.5,
        "per_position_acceptance_rate": [3 / 5, 2 / 5],
    }
    assert counts.rest_ms == pytest.approx(50.0)
    assert rounds[0].context == 8
    # steps without a draft are in no counter; what lies behind the end is cut
    assert count_rounds(rounds_of(counters, 14, 7, 1.0)).rounds == 8
    cut = count_rounds(rounds_of(counters, 9, 7, 1.0))
    assert (cut.committed, cut.kept) == (10, 8)
    assert count_rounds(rounds_of(Counters(), 6, 7, 1.0)).acceptance_length == 1.0


class Server:
    """Answers prompts that it knows, in pieces of one token and then of up to three, and counts as vLLM does."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], metrics: bool = True, llama_cpp: bool = False) -> None:
        self.texts, self.metrics, self.llama_cpp = texts, metrics, llama_cpp
        self.drafts = self.accepted = 0
        self.at = [0, 0]
        self.broken = False
        self.url = ""

    def pieces(self, prompt: list[int], most: int) -> list[list[int]]:
        ids = self.texts[tuple(prompt)][:most]
        pieces, place, size = [ids[:1]], 1, 0
        while place < len(ids):
            size = size % 3 + 1
            pieces.append(ids[place : place + size])
            self.drafts += 1
            self.accepted += size - 1
            self.at[0] += size > 1
            self.at[1] += size > 2
            place += size
        return pieces


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    tokenizer = talking_target().tokenizer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                made_by = {"owned_by": "llamacpp"} if server.llama_cpp else {}
                self.say(200, json.dumps({"data": [{"id": "tiny", **made_by}]}))
            elif self.path == "/metrics" and server.metrics:
                self.say(200, PAGE % (server.drafts, 2 * server.drafts, server.accepted, *server.at))
            else:
                self.say(404, "nothing here")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if server.broken:
                self.say(500, "out of memory")
                return
            assert body["stream"]
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            assert "n_probs" not in body
            pieces = server.pieces(body["prompt"], body["max_tokens"])
            drafts, accepted = len(pieces) - 1, sum(map(len, pieces)) - len(pieces)
            if server.llama_cpp:  # singly, with the counts at the end
                pieces = [[token] for piece in pieces for token in piece]
            ended = pieces[-1][-1] in talking_target().spec.eos_ids
            for n, ids in enumerate(pieces):
                last = n == len(pieces) - 1
                reason = ("stop" if ended else "length") if last else None
                text = tokenizer.decode(ids, skip_special_tokens=True)
                choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason}
                self.write({"choices": [choice], "usage": None})
                time.sleep(0.002)
            self.write({"choices": [], "usage": {"prompt_tokens": len(body["prompt"])}})
            if server.llama_cpp:
                self.write({"choices": [], "timings": {"draft_n": 2 * drafts, "draft_n_accepted": accepted}})
            self.wfile.write(b"data: [DONE]\n\n")

        def write(self, piece: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.flush()

        def say(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            with suppress(BrokenPipeError):
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


CHAT = [conversation(f"c{i}", f"Say {'hi ' * (i + 1)}") for i in range(3)]
OPTIONS = BenchOptions(prompts=3, max_new_tokens=14, warmup=0)


def known(count: int = 14) -> dict[tuple[int, ...], list[int]]:
    from draftsmith.target import chat

    target = talking_target()
    found = {}
    for text, one in zip(answers(target, CHAT, count), CHAT, strict=True):
        prompt = chat.prompt_ids(target.tokenizer, one.messages)
        found[tuple(prompt)] = text[len(prompt) :]
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "SETTLED", 0.001)


@pytest.mark.parametrize("metrics", [True, False])
def test_a_server_beside_the_engine(tmp_path: Path, metrics: bool) -> None:
    with serving(Server(known(), metrics)) as server:
        mode = EndpointMode("vllm", ServerOptions(url=server.url), talking_target())
        rows = bench(talking_target(), {}, {"chat": CHAT}, OPTIONS, tmp_path / "bench.jsonl", peers=[mode])
        (result,) = results(rows)
        assert (result.drafters, result.engine, result.compared_with) == ("vllm", "server", "plain")
        assert result.lossless.model_dump() == {"checked": 3, "equal": 3, "near_ties": 0}
        own = [row for row in rows if row["drafters"] == "vllm"]
        assert all(0 < row["first_token_ms"] < row["generation"]["total_ms"] for row in own)
        assert result.first_token_ms is not None
        # 13 tokens after the first, in rounds of 1, 2, 3, 1, …; the last may be cut
        assert result.rounds == server.drafts
        tokens = sum(len(row["generation"]["token_ids"]) for row in own)
        assert result.acceptance_length_after_cut == pytest.approx((tokens - 3) / server.drafts)
        assert (result.draft_ms, result.verify_ms) == (None, None)
        if not metrics:
            assert result.acceptance_by_depth == []
        else:
            assert result.acceptance_length == pytest.approx(1 + server.accepted / server.drafts)
            assert result.acceptance_by_depth == pytest.approx(
                [server.at[0] / server.drafts, server.at[1] / server.at[0]]
            )


def test_a_batch_is_sent_at_once_and_its_rounds_are_what_was_streamed() -> None:
    texts = known()
    with serving(Server(texts)) as server:
        mode = EndpointMode("vllm", ServerOptions(url=server.url), talking_target())
        prompts = [list(p) for p in texts]
        found = mode.decode(prompts, ["a", "b", "c"], Sampling(), 14)
        assert [d.generation.token_ids for d in found] == list(texts.values())
        assert sum(len(d.generation.rounds) for d in found) == server.drafts
        assert len({d.generation.total_ms for d in found}) == 1


def test_llama_cpps_own_counts_are_taken_where_it_streams_tokens_singly() -> None:
    texts = known()
    with serving(Server(texts, metrics=False, llama_cpp=True)) as server:
        mode = EndpointMode("llama.cpp", ServerOptions(url=server.url), talking_target())
        found = mode.decode([list(p) for p in texts], ["a", "b", "c"], Sampling(), 14)
        counts = count_rounds(r for d in found for r in d.generation.rounds)
        assert [d.generation.token_ids for d in found] == list(texts.values())
        assert (counts.rounds, counts.drafted) == (server.drafts, 2 * server.drafts)
        assert sum(r.accepted for d in found for r in d.generation.rounds) == server.accepted
        assert counts.kept == sum(map(len, texts.values())) - len(texts)
        assert all(r.reached == r.accepted for d in found for r in d.generation.rounds), "depths were not told"


def test_a_server_that_fails_is_listed(tmp_path: Path) -> None:
    with serving(Server(known())) as server:
        mode = EndpointMode("vllm", ServerOptions(url=server.url), talking_target())
        server.broken = True
        with pytest.raises(UserError, match="status 500: out of memory"):
            bench(talking_target(), {}, {"chat": CHAT}, OPTIONS, tmp_path / "bench.jsonl", peers=[mode])
        assert (tmp_path / "bench-failed.jsonl").is_file()
    with pytest.raises(UserError, match="no server can be reached"):
        EndpointMode("vllm", ServerOptions(url=server.url, retries=0), talking_target())
