"""Turns, grading and peers in a measurement: transformers' own decoding of the same target, counted by hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.conversations import Conversation, Message
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.evaluation.bench import BenchOptions, bench, results
from draftsmith.evaluation.peers import TransformersMode
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.target import chat
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.talking import VOCAB, Memory, answers, conversation, talking_target
from tests.tiny import tiny_target

CHAT = [conversation(f"c{i}", f"Say {'hi ' * (i + 1)}") for i in range(4)]
OPTIONS = BenchOptions(prompts=4, max_new_tokens=20, warmup=0)


def lookup() -> Single:
    return Single(NgramDrafter(NgramOptions(guess=False), VocabMap.identity(VOCAB)), DynamicGrowth(7, 3, 2))


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standalone draft that is right about half of the time: the target with some noise."""
    folder = tmp_path_factory.mktemp("near")
    model: Any = copy.deepcopy(talking_target().model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.04 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def test_transformers_writes_the_same_texts_and_its_rounds_are_its_passes(tmp_path: Path, near: Path) -> None:
    target = talking_target()
    modes = [
        TransformersMode("transformers", target),
        TransformersMode("transformers-prompt-lookup", target, lookup=True),
        TransformersMode("assisted", target, assistant=near, draft_tokens=3),
    ]
    passes = 0

    def seen(*_: object) -> None:
        nonlocal passes
        passes += 1

    decoded: dict[str, list[int]] = {}
    for mode in modes:
        own = mode.decode

        def counted(*arguments: Any, own: Any = own, name: str = mode.name) -> Any:
            nonlocal passes
            passes = 0
            handle = target.model.register_forward_hook(seen)
            found = own(*arguments)
            handle.remove()
            decoded.setdefault(name, []).append(passes)
            return found

        mode.decode = counted  # type: ignore[method-assign]
    rows = bench(target, {"lookup": lookup()}, {"chat": CHAT}, OPTIONS, tmp_path / "bench.jsonl", peers=modes)
    found = {r.drafters: r for r in results(rows)}
    assert found.keys() == {"lookup", "transformers", "transformers-prompt-lookup", "assisted"}
    assert all(r.lossless.equal == r.lossless.checked == 4 for r in found.values())
    for name, counts in decoded.items():
        own_rows = [row for row in rows if row["drafters"] == name]
        # a pass is the prefill or a round, in the order in which prompts were decoded
        assert [1 + len(row["generation"]["rounds"]) for row in own_rows] == counts
        for row in own_rows:
            generation = row["generation"]
            assert len(row["origins"]) == len(row["depths"]) == len(generation["token_ids"])
            after = sum(r["kept"] for r in generation["rounds"])
            assert all(origin < 0 for origin, depth in zip(row["origins"], row["depths"], strict=True) if not depth)
            assert 1 <= len(generation["token_ids"]) - after <= 1 + 10  # what the prompt's pass wrote
            assert row["first_token_ms"] <= generation["total_ms"]
    plain, assisted = found["transformers"], found["assisted"]
    assert plain.acceptance_length == 1.0
    assert (plain.compared_with, assisted.compared_with, found["lookup"].compared_with) == (
        "plain",
        "transformers",
        "plain",
    )
    assert (assisted.engine, assisted.node_budget, assisted.verify_ms) == ("transformers", 3, None)
    # partly right: some rounds accept all three, some none
    accepted = {r["accepted"] for row in rows if row["drafters"] == "assisted" for r in row["generation"]["rounds"]}
    assert accepted >= {0, 3}
    assert 1.5 < assisted.acceptance_length < 4


def test_a_perfect_assistant_is_accepted_whole(near: Path, tmp_path: Path) -> None:
    target = talking_target()
    target.model.save_pretrained(tmp_path / "same")
    mode = TransformersMode("assisted", target, assistant=tmp_path / "same", draft_tokens=3)
    prompt = chat.prompt_ids(target.tokenizer, CHAT[0].messages)
    (found,) = mode.decode([prompt], ["a"], Sampling(), 17)
    assert found.generation.token_ids == answers(target, CHAT[:1], 17)[0][len(prompt) :]
    whole = found.generation.rounds[:-1]
    assert whole
    assert all((r.nodes, r.reached, r.accepted, r.committed) == (3, 3, 3, 4) for r in whole)


def test_plain_transformers_in_a_batch_and_sampled() -> None:
    target = talking_target()
    mode = TransformersMode("transformers", target)
    prompts = [chat.prompt_ids(target.tokenizer, c.messages) for c in CHAT]
    alone = [mode.decode([p], [str(i)], Sampling(), 12)[0].generation.token_ids for i, p in enumerate(prompts)]
    together = mode.decode(prompts, list("0123"), Sampling(), 12)
    assert [d.generation.token_ids for d in together] == alone
    assert {d.generation.finish for d in together} <= {"stop", "length"}
    before = torch.get_rng_state()
    hot = Sampling(temperature=1.0, seed=3)
    first, again = (mode.decode(prompts[:1], ["a"], hot, 12)[0].generation.token_ids for _ in range(2))
    other = mode.decode(prompts[:1], ["b"], hot, 12)[0].generation.token_ids
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before), "the global generator was left changed"


def test_sampled_texts_of_another_engine_are_not_compared(tmp_path: Path) -> None:
    target = talking_target()
    options = OPTIONS.model_copy(update={"temperatures": (1.0,), "prompts": 2})
    modes = [TransformersMode("transformers", target)]
    (result,) = results(bench(target, {}, {"chat": CHAT}, options, tmp_path / "bench.jsonl", peers=modes))
    assert result.lossless.checked == 0


def test_an_assistant_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no causal language model"):
        TransformersMode("assisted", talking_target(), assistant=tmp_path)
    tiny_target().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't be paired"):
        TransformersMode("assisted", talking_target(), assistant=tmp_path)


def two_turns(name: str) -> Conversation:
    messages = (Message("user", f"Write {name}"), Message("assistant", ""), Message("user", "Once more"))
    return Conversation(name, messages, reference="7")


@pytest.mark.parametrize("batch", [1, 2])
def test_two_turns_the_first_answer_is_plain_decodings(tmp_path: Path, batch: int) -> None:
    target = talking_target()
    asked = [two_turns("a"), two_turns("b"), conversation("single", "Say hi")]
    options = OPTIONS.model_copy(update={"temperatures": (0.0, 0.9), "batch": batch})
    drafter = Single(Memory(answers(target, CHAT, 20)), DynamicGrowth(7, 3, 3))
    out = tmp_path / "bench.jsonl"
    rows = bench(target, {"tree": drafter}, {"mt-bench": asked}, options, out)
    assert {row["id"] for row in rows} == {"a@1", "a@2", "b@1", "b@2", "single"}
    assert len(rows) == 5 * 2 * 2
    plain = {(row["id"], row["temperature"]): row for row in rows if row["mode"] == "plain"}
    for (name, temperature), row in plain.items():
        if not name.endswith("@2"):
            continue
        first = plain[f"{name[0]}@1", temperature]["generation"]["token_ids"]
        told = target.tokenizer.decode(first, skip_special_tokens=True)
        messages = [Message("user", f"Write {name[0]}"), Message("assistant", told), Message("user", "Once more")]
        own = Conversation(name, tuple(messages))
        (text,) = answers(target, [own], 20, (temperature,))
        assert row["prompt"] == "Once more"
        assert text[-len(row["generation"]["token_ids"]) :] == row["generation"]["token_ids"]
    assert all(row["equality"]["equal"] for row in rows if row["mode"] == "speculative")
    # resumed from the middle, a second turn reads the first one's answer from the file
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[: 2 * batch]), encoding="utf-8")
    again = bench(target, {"tree": drafter}, {"mt-bench": asked}, options, out)

    def texts(found: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        return {(r["id"], r["temperature"], r["drafters"], tuple(r["generation"]["token_ids"])) for r in found}

    assert texts(again) == texts(rows)


def test_answers_are_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = talking_target()
    prompt = len(chat.prompt_ids(target.tokenizer, CHAT[0].messages))
    texts = [target.tokenizer.decode(t[prompt:], skip_special_tokens=True) for t in answers(target, CHAT[:1], 20)]
    right = {texts[0]}
    monkeypatch.setattr(
        "draftsmith.evaluation.grading.grader", lambda name: (lambda a, gold: a in right) if name == "sums" else None
    )
    sets = {"sums": [Conversation(c.id, c.messages, reference="1") for c in CHAT], "chat": CHAT}
    rows = bench(target, {"lookup": lookup()}, sets, OPTIONS, tmp_path / "bench.jsonl")
    assert {row["correct"] for row in rows if row["set"] == "chat"} == {None}
    sums, chatted = results(rows)
    assert (sums.graded, sums.accuracy, sums.plain_accuracy) == (4, 0.25, 0.25)
    assert (chatted.graded, chatted.accuracy) == (None, None)
    assert {row["id"] for row in artefacts.read_jsonl(tmp_path / "bench.jsonl") if row["correct"]} == {"c0"}


def test_rounds_by_context_and_first_tokens(tmp_path: Path) -> None:
    rows = bench(talking_target(), {"lookup": lookup()}, {"chat": CHAT}, OPTIONS, tmp_path / "bench.jsonl")
    (result,) = results(rows)
    assert result.by_context
    assert sum(b.rounds for b in result.by_context) == result.rounds
    assert result.first_token_ms is not None
    assert result.first_token_ms > 0
    low, high = result.acceptance_length_low, result.acceptance_length_high
    assert low is not None
    assert high is not None
    assert low <= result.acceptance_length <= high


def test_names_have_to_differ(tmp_path: Path) -> None:
    modes = [TransformersMode("lookup", talking_target())]
    with pytest.raises(UserError, match="names of its own"):
        bench(talking_target(), {"lookup": lookup()}, {"chat": CHAT}, OPTIONS, tmp_path / "b.jsonl", peers=modes)
