"""`draftsmith verify-lossless`: does decoding with these drafters write what the target writes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from draftsmith import api
from draftsmith.commands.bench import composed, numbers
from draftsmith.data.benchmarks import load_benchmark
from draftsmith.data.conversations import Conversation
from draftsmith.data.prompts import make_prompts
from draftsmith.decoding.stored import pairs
from draftsmith.evaluation import lossless
from draftsmith.evaluation.lossless import Compared, Group, Prompt
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.target import chat
from draftsmith.target.model import HFTarget, Kernels, load_target


def verify(
    target: str | None,
    drafters: Sequence[str],
    *,
    compose: Sequence[str] = (),
    prompts: str | None,
    count: int,
    temperatures: str,
    max_new_tokens: int,
    batch: int,
    seed: int,
    dtype: str,
    device: str,
    kernels: Kernels = "plain",
    out: Path | None,
) -> bool:
    """Run the suite, print its table, near ties and verdict, write them as JSON; True if decoding is lossless.

    Raises:
        UserError: a target, drafter or prompt file that is not there, or temperatures that are no numbers.
    """
    paths = pairs(drafters)
    loaded = load_target(target or api.target_of(paths.values()), dtype, device, kernels=kernels)
    compositions = composed(loaded, paths, compose)
    asked = questions(loaded, prompts, count, seed)
    heats = numbers(temperatures) or [0.0]
    total = len(asked) * len(heats) * (1 + len(compositions))
    found: list[Compared] = []
    with console.progress("comparing with plain decoding", total, "answers") as bar:
        for one in lossless.compare(loaded, compositions, asked, heats, max_new_tokens, batch, seed):
            found.append(one)
            bar.advance(1)
    groups = lossless.grouped(found)
    show(groups, found)
    sound, said = lossless.verdict(found, loaded.spec.dtype)
    (console.say if sound else console.error)(said)
    if out is not None:
        settings = {
            "prompts": prompts or "made",
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "seed": seed,
            "drafters": paths,
            "compose": list(compose),
        }
        artefacts.write_json(
            out,
            {
                "schema": 1,
                "lossless": sound,
                "verdict": said,
                "target": {
                    "name": loaded.spec.name,
                    "fingerprint": loaded.spec.fingerprint,
                    "dtype": loaded.spec.dtype,
                },
                "settings": settings,
                "groups": [asdict(group) for group in groups],
                "answers": [one.to_row() for one in found],
                "provenance": provenance.collect(),
            },
        )
        console.say(f"all comparisons: {out}")
    return sound


def questions(target: HFTarget, prompts: str | None, count: int, seed: int) -> list[Prompt]:
    """The prompts as ids: of a file or benchmark, else made ones, half everyday requests and half word problems."""
    found: list[Conversation]
    if prompts is not None:
        found = load_benchmark(prompts, count, seed)
    else:
        half = count // 2
        found = make_prompts("chat", "test", count - half, seed) + (
            make_prompts("word-problems", "test", half, seed) if half else []
        )
    return [Prompt(conversation.id, _ids(target, conversation)) for conversation in found]


def show(groups: Sequence[Group], found: Sequence[Compared]) -> None:
    """The counts as a table, and each near tie in a line."""
    console.table(
        "Speculative against plain decoding",
        ("drafters", "temperature", "answers", "equal", "near ties", "wrong", "tokens", "accepted at most", "τ"),
        [
            (
                g.drafters,
                f"{g.temperature:g}",
                g.answers,
                g.equal,
                g.near_ties,
                g.unsound,
                g.tokens,
                g.deepest,
                f"{g.acceptance_length:.2f}",
            )
            for g in groups
        ],
    )
    for one in found:
        if one.tie:
            console.say(
                f"near tie: {one.prompt} with {one.drafters} at temperature {one.temperature:g} parts at token "
                f"{one.equality.first_difference}, where two tokens' scores are {one.equality.gap:.2g} apart"
            )


def _ids(target: HFTarget, conversation: Conversation) -> list[int]:
    if getattr(target.tokenizer, "chat_template", None):
        return chat.prompt_ids(target.tokenizer, conversation.messages)
    ids: list[int] = target.tokenizer("\n".join(message.content for message in conversation.messages)).input_ids
    return ids
