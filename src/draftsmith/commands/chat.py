"""`draftsmith chat`: talk to a run's target; each token's colour says who wrote it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from draftsmith.api import Model, Stream, TextPiece, load, run_target
from draftsmith.commands.terminal import coloured, write_styled
from draftsmith.decoding.stored import pairs
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError

# One hue for each drafter, one shade for each depth: the deeper, the darker. Terminals of 16 colours show the hue.
SHADES = (
    ("#5fd75f", "#00d700", "#00af00", "#008700", "#006f00"),
    ("#5fafff", "#0087ff", "#005fff", "#005fd7", "#005faf"),
    ("#d7af00", "#af8700", "#af5f00", "#875f00", "#6f4f00"),
    ("#ff5fff", "#d75fd7", "#af00af", "#870087", "#6f006f"),
)
HELP = "An empty line is passed over; /new starts a new conversation, Ctrl-C stops an answer, Ctrl-D leaves."


def chat(
    run: Path,
    target: str | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    plain: bool = False,
    prompt: str | None = None,
    read: Callable[[], str] | None = None,
    drafters: Sequence[str] = (),
    compose: str | None = None,
) -> None:
    """Hold a conversation, or answer `prompt` and end.

    Args:
        run: the run's folder, or a drafter's (then with `target`).
        target: the target's name; default: the run's.
        temperature, seed, max_new_tokens: as in `Model.generate`.
        plain: without the drafter.
        prompt: one message to answer.
        drafters, compose: `name=path` of several drafters and how they are put together, instead of the run's own; the
            run still says which target.
        read: where the user's lines come from (EOFError ends the conversation); default: the keyboard.

    Raises:
        UserError: something of the run is missing, or, with `prompt`, the answer can't be written.
    """
    dtype = device = "auto"
    if target is None:
        target, dtype, device = run_target(run)
    spec = None if plain else compose
    converse(
        load(target, None if plain else pairs(drafters) or run, dtype=dtype, device=device, compose=spec),
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        read=read,
    )


def converse(
    model: Model,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    prompt: str | None = None,
    read: Callable[[], str] | None = None,
) -> None:
    """`chat` with a model that is loaded already."""
    messages: list[dict[str, str]] = []

    def answer(text: str) -> None:
        messages.append({"role": "user", "content": text})
        try:
            stream = model.generate(
                messages, stream=True, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            reply = _show(stream)
        except UserError:
            messages.pop()
            raise
        if reply is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": reply})

    if model.composition is not None and coloured():
        _legend()
    if prompt is not None:
        answer(prompt)
        return
    console.say(HELP)
    while True:
        try:
            text = (read or _keyboard)().strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            console.say("\nCtrl-D leaves.")
            continue
        if text == "/new":
            messages.clear()
            console.say("A new conversation.")
        elif text:
            try:
                answer(text)
            except UserError as problem:
                console.error(f"{problem}; /new starts a new conversation")


def _show(stream: Stream) -> str | None:
    """Write an answer as it comes, and what it took; Ctrl-C ends it early. Returns its text, None if nothing came."""
    started = time.perf_counter()
    pieces: list[TextPiece] = []
    stopped = False
    try:
        for piece in stream:
            pieces.append(piece)
            write_styled(piece.texts, map(style, piece.owners, piece.depths))
    except KeyboardInterrupt:
        stopped = True
        stream.close()
    seconds = time.perf_counter() - started
    console.say("")
    tokens = sum(len(piece.token_ids) for piece in pieces)
    if 0 in stream.answers:
        length = stream.answer.acceptance_length
        seconds = stream.answer.generation.total_ms / 1e3
    else:
        # an answer that was stopped was never cut: its pieces are whole rounds, after the prefill's token
        rounds = len(pieces) - 1
        length = (tokens - 1) / rounds if rounds > 0 else float("nan")
    accepted = "" if math.isnan(length) else f", acceptance length {length:.2f}"
    speed = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""
    end = " (stopped)" if stopped else ""
    console.say(f"[{tokens} token{'s' * (tokens != 1)} in {console.duration(seconds)}{speed}{accepted}]{end}")
    return "".join(piece.text for piece in pieces) if pieces else None


def style(owner: int, depth: int) -> str:
    """A token's colour: none for the target's own, else the drafter's hue in the depth's shade."""
    if owner < 0:
        return ""
    shades = SHADES[owner % len(SHADES)]
    return shades[min(depth, len(shades)) - 1]


def _legend() -> None:
    console.write("Uncoloured: written by the target. Drafted and accepted, by depth:")
    deepest = len(SHADES[0])
    for depth in range(1, deepest + 1):
        console.write(f" {depth}{'+' * (depth == deepest)}", style(0, depth))
    console.say("")


def _keyboard() -> str:
    return input("\n> " if sys.stdin.isatty() else "")
