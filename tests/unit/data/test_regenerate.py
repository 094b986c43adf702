"""The target's own answers: what is asked, in which batches, and that a kill between them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.tiny_folder import write_target

from draftsmith.data import regenerate as regeneration
from draftsmith.data.conversations import Conversation, Message
from draftsmith.data.features import FeatureStore, PassOptions, store, store_watched
from draftsmith.data.regenerate import RegenerateOptions, plan, read, regenerate
from draftsmith.data.samples import samples_of
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.target import chat
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.sampling import Sampling

GREEDY = RegenerateOptions(max_new_tokens=10, batch=3)
SAMPLED = RegenerateOptions(max_new_tokens=10, batch=3, sampling=Sampling(temperature=1.0, seed=5))


class Killed(BaseException):
    """Stands for a kill: no `except Exception` holds it back."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> HFTarget:
    return load_target(write_target(tmp_path_factory.mktemp("target"), positions=160), "float32")


def ask(name: str, *turns: str, system: str | None = None) -> Conversation:
    messages = [Message("system", system)] if system else []
    for number, turn in enumerate(turns):
        if number:
            messages.append(Message("assistant", "somebody else's words"))
        messages.append(Message("user", turn))
    return Conversation(name, tuple(messages), "test")


ASKED = [
    ask("a", "Why?"),
    ask("b", "Where is the key?", "And the door?", "Thanks."),
    ask("c", "How many apples are left?", system="Be kind"),
    ask("d", "Go on", "Stop"),
    *(ask(f"e{n}", "x" * (3 * n + 1)) for n in range(4)),
]
NAMES = ["a", "b@1", "b@2", "b@3", "c", "d@1", "d@2", "e0", "e1", "e2", "e3"]


def plainly(target: HFTarget, prompt: list[int], limit: int) -> list[int]:
    """Greedy decoding by the model itself, one pass over everything for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            ids.append(int(target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.spec.eos_ids:
            break
    return ids[len(prompt) :]


def test_each_answer_is_what_the_target_writes_after_its_own_earlier_turns(target: HFTarget, tmp_path: Path) -> None:
    rows = read(regenerate(target, ASKED, GREEDY, tmp_path / "out", {}))
    assert [row.id for row in rows] == NAMES
    own: dict[str, str] = {}
    for row in rows:
        assert row.answer is not None
        name, _, turn = row.id.partition("@")
        source = next(c for c in ASKED if c.id == name)
        users = [m for m in source.messages if m.role == "user"][: int(turn or 1)]
        expected = [m for m in source.messages if m.role == "system"]
        for number, user in enumerate(users, start=1):
            expected.append(user)
            if number < len(users):
                expected.append(Message("assistant", own[f"{name}@{number}"]))
        assert list(row.messages[:-1]) == expected, "the target's own words, not those of the file"
        prompt = chat.prompt_ids(target.tokenizer, expected)
        assert list(row.answer.prompt_ids) == prompt
        written = plainly(target, prompt, 10)
        assert list(row.answer.token_ids) == written
        assert row.answer.complete == (written[-1] in target.spec.eos_ids)
        assert row.messages[-1].role == "assistant"
        assert row.messages[-1].content == target.tokenizer.decode(written, skip_special_tokens=True)
        own[row.id] = row.messages[-1].content
    complete = {row.answer.complete for row in rows if row.answer}
    lengths = {len(row.answer.token_ids) for row in rows if row.answer}
    assert complete == {True, False}
    assert len(lengths) > 2, "rows of a batch should end at different times, and some at the limit"


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_batches_do_not_matter(target: HFTarget, tmp_path: Path, options: RegenerateOptions) -> None:
    """Finished rows leave the batch; a row's text depends on nothing but its prompt (and its own name, sampled)."""
    texts = []
    for batch in (1, 3, 64):
        place = tmp_path / str(batch)
        rows = read(regenerate(target, ASKED, options.model_copy(update={"batch": batch}), place, {}))
        texts.append({row.id: row.answer.token_ids for row in rows if row.answer})
    assert texts[0] == texts[1] == texts[2]


def test_the_longest_prompts_come_first_and_every_turn_is_asked() -> None:
    assert [job.id for turn in range(3) for job in plan(ASKED, turn)] == [
        *("a", "b@1", "c", "d@1", "e0", "e1", "e2", "e3"),
        *("b@2", "d@2"),
        "b@3",
    ]
    many = ask("m", *(f"turn {n}" for n in range(11)))
    assert [plan([many], turn)[0].id for turn in range(11)] == [f"m@{n}" for n in range(1, 12)]
    assert plan([many], 11) == []


def test_a_long_conversation_loses_no_turn(target: HFTarget, tmp_path: Path) -> None:
    many = ask("m", *("abcdefghij"))
    options = GREEDY.model_copy(update={"max_new_tokens": 1})
    wide = load_target(write_target(tmp_path / "wide", positions=1024), "float32")
    rows = read(regenerate(wide, [many], options, tmp_path / "out", {}))
    assert [row.id for row in rows] == [f"m@{n}" for n in range(1, 11)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_killed_between_batches_it_goes_on_and_writes_the_same_file(
    target: HFTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: RegenerateOptions
) -> None:
    regenerate(target, ASKED, options, tmp_path / "undisturbed", {"inputs": 1})
    expected = (tmp_path / "undisturbed" / "manifest.json").read_bytes()
    write, calls = regeneration.write, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return write(*arguments)

    monkeypatch.setattr(regeneration, "write", counted)
    kills = 0
    while True:
        calls = 0
        try:
            regenerate(target, ASKED, options, tmp_path / "out", {"inputs": 1})
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "out").exists()
    assert kills == 4, "5 batches (3 + 1 + 1 over the turns), one a life"
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected


def test_what_was_begun_with_other_options_is_not_taken_up(
    target: HFTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            regenerate(target, ASKED, SAMPLED, tmp_path / "out", {})
    regenerate(target, ASKED, GREEDY, tmp_path / "out", {})
    regenerate(target, ASKED, GREEDY, tmp_path / "undisturbed", {})
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (
        tmp_path / "undisturbed" / "manifest.json"
    ).read_bytes()


def test_what_cannot_be_answered_is_set_aside_with_its_reason(
    target: HFTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt without room, and a conversation that grows out of it: its later turns go too."""
    asked = [ask("long", "y" * 200), ask("fine", "Why?"), ask("grows", "Why?", "z" * 200, "Thanks.")]
    out = regenerate(target, asked, GREEDY, tmp_path / "out", {})
    assert [row.id for row in read(out)] == ["fine", "grows@1"]
    rows = {row["id"]: row["reason"] for row in artefacts.read_jsonl(out / "quarantine.jsonl")}
    assert list(rows) == ["long", "grows@2", "grows@3"]
    assert "tokens, and the target takes 160 with the answer" in rows["long"]
    assert rows["grows@3"] == "an earlier turn could not be answered"
    assert "3 of 5 answers can't be written, the first (long)" in capsys.readouterr().err
    with pytest.raises(UserError, match="no conversation can be answered: its prompt has"):
        regenerate(target, asked[:1], GREEDY, tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_ids_that_would_collide_are_refused(target: HFTarget, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two answers would be called 'a@1'"):
        regenerate(target, [ask("a", "Why?", "Why not?"), ask("a@1", "Where?")], GREEDY, tmp_path / "out", {})


def test_a_target_without_a_template_is_refused(tmp_path: Path) -> None:
    plain = load_target(write_target(tmp_path / "target", template=None), "float32")
    with pytest.raises(UserError, match="has no chat template"):
        regenerate(plain, ASKED, GREEDY, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_answers_of_another_target_are_refused(target: HFTarget, tmp_path: Path) -> None:
    out = regenerate(target, ASKED[:1], GREEDY, tmp_path / "out", {})
    assert read(out, {"target": target.spec.fingerprint})
    with pytest.raises(StaleError, match="target is"):
        read(out, {"target": "another"})


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_statistics_taken_while_writing_are_those_of_a_pass_over_the_text(
    how: RegenerateOptions, target: HFTarget, tmp_path: Path
) -> None:
    """Of rows that leave the batch at different times, of several turns, at any temperature."""
    counted = {"a", "b@2", "e1"}.__contains__
    place = regenerate(target, ASKED, how, tmp_path / "answers", {}, counted=counted)
    seen = regeneration.read_statistics(place)
    assert seen is not None
    samples = [s for c in read(place) for s in samples_of(c, target.tokenizer)]
    assert len({sum(s.mask) for s in samples}) > 1
    own = FeatureStore(store_watched(target.spec, samples, seen, tmp_path / "own", {}))
    passed = FeatureStore(store(target, samples, FeatureSpec(), PassOptions(), tmp_path / "pass", {}, counted))
    for sample in samples:
        known, wanted = own[sample.id], passed[sample.id]
        assert known.ids.tolist() == sample.ids
        assert known.mask.tolist() == sample.mask
        assert known.complete == sample.complete
        rows = known.answer_rows
        for name, column in wanted.statistics.items():
            torch.testing.assert_close(known.statistics[name][rows], column[rows], rtol=1e-4, atol=1e-5)
            assert not known.statistics[name][~rows].any()
    torch.testing.assert_close(own.expected(), passed.expected(), rtol=1e-4, atol=1e-6)
    assert float(own.expected().sum()) == pytest.approx(sum(sum(s.mask) for s in samples if counted(s.id)), rel=1e-5)


def test_statistics_survive_a_kill_between_batches(target: HFTarget, tmp_path: Path) -> None:
    def kill(tokens: int) -> None:
        if (tmp_path / "killed.partial").exists() and list((tmp_path / "killed.partial").rglob("0-00001.jsonl")):
            raise Killed

    whole = regenerate(target, ASKED, GREEDY, tmp_path / "whole", {})
    with pytest.raises(Killed):
        regenerate(target, ASKED, GREEDY, tmp_path / "killed", {}, on_tokens=kill)
    again = regenerate(target, ASKED, GREEDY, tmp_path / "killed", {})
    assert (again / regeneration.STATISTICS).read_bytes() == (whole / regeneration.STATISTICS).read_bytes()


def test_statistics_can_be_left_out(target: HFTarget, tmp_path: Path) -> None:
    without = RegenerateOptions(max_new_tokens=4, batch=3, statistics=False)
    place = regenerate(target, ASKED[:3], without, tmp_path / "answers", {})
    assert regeneration.read_statistics(place) is None
