"""A real little server of OpenAI's protocol, on a port of this machine, that says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.unit.target.tokenizers_for_tests import byte_tokenizer

from draftsmith.data.replies import Asked, ServedAnswer, Tally
from draftsmith.data.served import ServerOptions, answer
from draftsmith.target.sampling import Sampling

Json = dict[str, Any]
Reply = tuple[int, Json | str] | tuple[int, Json | str, dict[str, str]]
TOKENIZER = byte_tokenizer(None)
END = int(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
OTHER_END = int(TOKENIZER.convert_tokens_to_ids("<|eot_id|>"))
EOS = (OTHER_END, END)


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


class Script:
    """What the server says, and what it was told."""

    def __init__(self) -> None:
        self.models: Reply = (200, {"data": [{"id": "small"}, {"id": "large"}]})
        self.complete: Callable[[Json, int], Reply] = lambda body, tries: (200, completion("ok", ids=encode("ok")))
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._lock = threading.Lock()

    def completed(self, body: Json) -> Reply:
        with self._lock:
            tries = sum(b["prompt"] == body["prompt"] for b in self.bodies)
            self.bodies.append(body)
        return self.complete(body, tries)


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(script.models if self.path == "/v1/models" else (404, "nothing here"))

        def do_POST(self) -> None:
            script.headers.append(dict(self.headers))
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.say(script.completed(body) if self.path == "/v1/completions" else (404, "nothing here"))

        def say(self, reply: Reply) -> None:
            status, content, *more = reply
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **(more[0] if more else {})}.items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # a client that waited too long has left
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False  # closing waits for them
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


def completion(text: str, reason: str = "stop", *, ids: Sequence[int] | None = None, **choice: object) -> Json:
    found = {"index": 0, "text": text, "finish_reason": reason, **choice}
    return {"choices": [found | ({} if ids is None else {"token_ids": list(ids)})]}


def asked(count: int, start: int = 0) -> list[Asked]:
    return [Asked(i, [i, 5, 6], f"r{i}") for i in range(start, start + count)]


def answers(
    server: Script, count: int = 1, sampling: Sampling | None = None, tally: Tally | None = None, **options: Any
) -> list[ServedAnswer]:
    found = answer(
        ServerOptions(url=server.url, **options), asked(count), sampling or Sampling(), 16, TOKENIZER, EOS, tally
    )
    return sorted(found, key=lambda a: a.index)
