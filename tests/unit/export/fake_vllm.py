"""A little server that speaks as vLLM does: completions by token ids, and the counters of its speculation."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What `/metrics` of vLLM 0.32.0 looks like, with a second engine that did nothing.
PAGE = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {written:.1f}
vllm:generation_tokens_total{{engine="1",model_name="m"}} 0.0
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{{engine="0",model_name="m"}} 1.795e+09
"""
SPECULATION = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts:.1f}
vllm:spec_decode_num_drafts_total{{engine="1",model_name="m"}} 0.0
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.795e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted:.1f}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted:.1f}
"""
DEPTH = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="{d}"}} {n:.1f}\n'

Answered = Callable[[list[int], int], tuple[list[int], str, list[int]]]


@dataclass
class FakeVllm:
    """Attributes:
    answer: prompt ids and limit → answer ids, finish reason, accepted tokens of each round.
    chain: tokens drafted in a round.
    """

    answer: Answered
    chain: int
    speculates: bool = True
    ids: bool = True
    others: int = 0
    lag: int = 0
    page: str | None = None
    accepted: list[int] = field(default_factory=list)
    written: int = 1000  # as if it had answered before
    looks: int = 0
    url: str = ""

    def metrics(self) -> str:
        if self.page is not None:
            return self.page
        self.looks += 1
        behind = 5 if self.accepted and self.looks <= 1 + self.lag else 0
        text = PAGE.format(written=self.written - behind)
        if not self.speculates:
            return text
        n = len(self.accepted)
        text += SPECULATION.format(drafts=77 + n, drafted=99 + n * self.chain, accepted=55 + sum(self.accepted))
        return text + "".join(DEPTH.format(d=d, n=sum(a > d for a in self.accepted)) for d in range(self.chain))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["temperature"] == 0.0
        ids, reason, rounds = self.answer(list(body["prompt"]), body["max_tokens"])
        self.accepted += rounds
        self.written += len(ids) + self.others
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": reason}
        return {"choices": [choice | ({"token_ids": ids} if self.ids else {})]}


@contextmanager
def running(fake: FakeVllm) -> Iterator[FakeVllm]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.say(200, fake.metrics().encode())
            elif self.path == "/v1/models":
                self.say(200, json.dumps({"data": [{"id": "m"}]}).encode())
            else:
                self.say(404, b"nothing here")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.say(200, json.dumps(fake.complete(body)).encode())

        def say(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def walked(agrees: Sequence[bool], length: int, chain: int) -> list[int]:
    """Accepted tokens of each round of chains over an answer: `agrees[i]`: its token i would be drafted rightly. What
    follows the answer's end counts, as in vLLM."""
    written, out = 1, []
    while written < length:
        depth = 0
        while depth < chain and agrees[written + depth]:
            depth += 1
        out.append(depth)
        written += depth + 1
    return out
