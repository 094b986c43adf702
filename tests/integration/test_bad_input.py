"""What newcomers get wrong, through the command line: one sentence (what, where, what to do), exit code 2, nothing
half-written, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.foundation import artefacts
from draftsmith.pipeline import STAGES
from tests.integration.command_line import Ended, draftsmith
from tests.integration.tiny_folder import RECIPE, write_recipe, write_target

GOOD = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("bad") / "target")


@pytest.fixture
def recipe(target: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", target)


def rows(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refused(ended: Ended, *said: str) -> str:
    """Exit code 2, and one line on stderr that holds all of `said`."""
    assert ended.code == 2, ended.err or ended.out
    lines = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, f"one sentence, not {ended.err!r}"
    (line,) = lines
    assert line.startswith("error: ")
    for part in said:
        assert part in line
    assert "Traceback" not in ended.err + ended.out
    return line


def only_whole_artefacts(run: Path) -> None:
    """Nothing that is seen under its own name is half-written."""
    for stage in STAGES.values():
        if (run / stage.folder).exists():
            artefacts.opened(run / stage.folder, stage.kind)
    assert not list(run.rglob(".*.tmp"))


def asked(recipe: Path, data: Path, *more: object) -> Ended:
    return draftsmith("prompts", "--run", recipe.parent / "run", "--recipe", recipe, "--data", data, *more)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "sub/nowhere.parquet"])
def test_a_missing_file(recipe: Path, tmp_path: Path, name: str) -> None:
    refused(asked(recipe, tmp_path / name), f"{tmp_path / name} does not exist")
    only_whole_artefacts(tmp_path / "run")
    assert not (tmp_path / "run" / "prompts").exists()


def test_a_file_without_a_conversation(recipe: Path, tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.json"):
        refused(asked(recipe, rows(tmp_path / name)), f"{tmp_path / name} is empty: it holds no conversation")
    (tmp_path / "empty").mkdir()
    refused(asked(recipe, tmp_path / "empty"), "holds no file with conversations (.jsonl")


def test_a_file_of_nothing_but_bad_rows(recipe: Path, tmp_path: Path) -> None:
    ended = asked(recipe, rows(tmp_path / "data.jsonl", "{", {"text": "hello"}))
    refused(ended, "none of its 2 rows can be used", "data.jsonl:1: not valid JSON")


def test_bad_rows_are_set_aside_with_file_line_and_reason(recipe: Path, tmp_path: Path) -> None:
    """Broken JSON in line 7, a conversation that starts with the assistant in line 3; the other eight are taken."""
    content: list[object] = [GOOD] * 10
    content[6] = '{"messages": [{"role": "user", "content": "Why'
    content[2] = {"messages": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]}
    ended = asked(recipe, rows(tmp_path / "data.jsonl", *content))
    assert ended.code == 0, ended.err
    run = tmp_path / "run"
    assert "2 rows set aside: 1 starts with the assistant, 1 not JSON" in ended.err
    assert str(run / "prompts" / "quarantine.jsonl") in ended.err
    assert ended.err.count("2 rows set aside") == 1
    found = list(artefacts.read_jsonl(run / "prompts" / "quarantine.jsonl"))
    assert [(row["file"], row["line"]) for row in found] == [(str(tmp_path / "data.jsonl"), n) for n in (3, 7)]
    assert "the assistant speaks first" in found[0]["reason"]
    assert "not valid JSON" in found[1]["reason"]
    kept = [
        row for split in ("train", "dev", "test") for row in artefacts.read_jsonl(run / "prompts" / f"{split}.jsonl")
    ]
    assert len(kept) == 8


def test_too_few_conversations(recipe: Path, tmp_path: Path) -> None:
    refused(asked(recipe, rows(tmp_path / "data.jsonl", GOOD, GOOD)), "2 usable conversations are too few")


def test_data_that_changed_meanwhile(recipe: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "data.jsonl", *[GOOD] * 5)
    assert asked(recipe, data).code == 0
    assert "done before" in asked(recipe, data).out
    rows(data, *[GOOD] * 6)
    refused(asked(recipe, data), f"{tmp_path / 'run' / 'prompts'} was made before {data} changed", "--redo")
    data.unlink()
    assert "done before" in asked(recipe, data).out, "what was made from it is still there"


def test_answers_of_the_file_that_are_none(recipe: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "data.jsonl", *[GOOD] * 6)
    assert asked(recipe, data, "data.keep_answers=true").code == 0
    ended = draftsmith("regenerate", "--run", tmp_path / "run")
    refused(ended, "conversations of", "wait for an answer", "data.keep_answers=false")


def test_answers_of_the_file_go_all_the_way(tmp_path: Path) -> None:
    """Several turns with answers, taken as they are; conversations longer than the target's positions are left out."""
    turns = [{"role": role, "content": f"{role} says so"} for role in ("user", "assistant") * 2]
    long = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x" * 2000}]
    data = rows(tmp_path / "data.jsonl", *({"id": f"c{n}", "messages": turns if n else long} for n in range(12)))
    recipe = write_recipe(tmp_path / "recipe.yaml", write_target(tmp_path / "target"))
    options = ["data.keep_answers=true", "data.train=12", "select.method=full"]
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe, "--data", data, *options)
    assert ended.code == 0, ended.err
    assert "1 of 10 answers are longer than the target's positions" in ended.err or "c0" in ids_for_test(
        tmp_path / "run"
    )
    sample = next(artefacts.read_jsonl(tmp_path / "run" / "selection" / "kept.jsonl"))
    assert [m["content"] for m in sample["messages"]] == [m["content"] for m in turns]

    # such answers are nobody's, so it is the store that knows which target read them
    shutil.rmtree(tmp_path / "target")
    write_target(tmp_path / "target", seed=1)
    for stage, folder in (("train", "scores"), ("tune", "drafter")):
        refused(draftsmith(stage, "--run", tmp_path / "run", "--redo"), f"{tmp_path / 'run' / folder} was", "target is")


def ids_for_test(run: Path) -> set[str]:
    return {row["id"] for row in artefacts.read_jsonl(run / "prompts" / "test.jsonl")}


def test_a_target_that_is_not_there(recipe: Path, tmp_path: Path) -> None:
    assert draftsmith("prompts", "--run", tmp_path / "run", "--recipe", recipe).code == 0
    for name, said in (
        (tmp_path / "nowhere", "no such folder; name a model folder, a GGUF file or a hub id"),
        (tmp_path, "no config.json in it, so it is not a model folder"),
        (tmp_path / "model.gguf", "no such GGUF file"),
    ):
        ended = draftsmith("regenerate", "--run", tmp_path / "run", "--target", name)
        refused(ended, str(name), said)
    assert not (tmp_path / "run" / "answers").exists()


def test_a_target_without_a_chat_template(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", write_target(tmp_path / "target", template=None))
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe)
    refused(ended, str(tmp_path / "target"), "has no chat template", "take its chat (instruct) version")
    only_whole_artefacts(tmp_path / "run")
    assert not (tmp_path / "run" / "answers").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, stage: str) -> None:
    """Every write fails from the middle of a stage on; when there is room again, the same command goes on."""
    run = tmp_path / "run"
    names = [STAGES[name].folder for name in STAGES]
    wanted = names[: names.index(STAGES[stage].folder)]
    for name in wanted:
        shutil.copytree(finished / name, run / name)
    shutil.copy(finished / "recipe.yaml", run.joinpath("recipe.yaml") if run.exists() else _made(run) / "recipe.yaml")
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(draftsmith(stage, "--run", run), "the disk is full", "free some space", str(run))
    assert not (run / STAGES[stage].folder).exists()
    only_whole_artefacts(run)
    ended = draftsmith(stage, "--run", run)
    assert ended.code == 0, ended.err


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = tmp_path_factory.mktemp("finished")
    ended = draftsmith("quickstart", "--run", folder / "run", "--recipe", write_recipe(folder / "recipe.yaml", target))
    assert ended.code == 0, ended.err
    return folder / "run"


def test_an_unknown_option_gets_the_nearest_name(recipe: Path, tmp_path: Path) -> None:
    run = ["quickstart", "--run", tmp_path / "run", "--recipe", recipe]
    said = "error: the command line: train.stpes is no option; did you mean train.steps?"
    assert refused(draftsmith(*run, "train.stpes=3")) == said
    refused(draftsmith(*run, "trian.steps=3"), "trian is no option; did you mean train?")
    refused(draftsmith(*run, "train.steps=many"), "the command line: train.steps must be a whole number, not 'many'")
    refused(draftsmith(*run, "train.steps"), "'train.steps' is no assignment: write name=value")
    refused(draftsmith(*run, "select.method=flattness"), "did you mean 'flatness'?")
    refused(draftsmith(*run, "export.to=[vlm]"), "export.to", "did you mean 'vllm'?")
    refused(draftsmith(*run, "train.seconds=9"), "train: only one of steps, seconds and epochs can be given")
    refused(draftsmith(*run, "data.sets=[chats]"), "there is no prompt set 'chats': choose word-problems or chat")
    assert not (tmp_path / "run" / "prompts").exists()


def test_a_recipe_with_a_wrong_option_names_its_line(target: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", target)
    lines = recipe.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "max_new_tokens" in text)
    recipe.write_text(recipe.read_text().replace("max_new_tokens: 12", "max_new_token: 12"))
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe)
    wanted = f"{recipe}:{line}: regenerate.max_new_token is no option; did you mean regenerate.max_new_tokens?"
    refused(ended, wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: [1, 2\n", "recipe.yaml:2: not valid YAML"),
        ("train:\n  steps: 3\n  steps: 4\n", "recipe.yaml:3: train.steps is given twice (first in line 2): remove one"),
        ("- train\n", "recipe.yaml:1: expected options (name: value), found a list"),
        ("train: 3\n", "recipe.yaml:1: train must be a group of options (name: value), not 3"),
        ("train:\n  steps: 3\n\tseconds: 1\n", "recipe.yaml:3: not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", tmp_path / "recipe.yaml")
    refused(ended, said)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", "quickstrat")
    refused(ended, "quickstrat: no such recipe file; draftsmith brings", "quickstart")


def test_a_run_folder_that_is_none(recipe: Path, tmp_path: Path) -> None:
    file = rows(tmp_path / "file", "x")
    refused(draftsmith("quickstart", "--run", file, "--recipe", recipe), f"{file} is a file: --run wants")
    refused(draftsmith("quickstart", "--run", file / "run", "--recipe", recipe), f"{file}")
    refused(draftsmith("train", "--run", tmp_path / "nowhere"), "prompts is missing: run `draftsmith prompts")
    for command in (["chat"], ["report"], ["export"]):
        refused(draftsmith(*command, "--run", tmp_path / "nowhere"), str(tmp_path / "nowhere"), "draftsmith ")
    assert not (tmp_path / "nowhere").exists(), "looking for a run may not make one"


def test_a_folder_of_somebody_elses(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "prompts").mkdir(parents=True)
    (tmp_path / "run" / "prompts" / "thesis.tex").write_text("years of work")
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe)
    refused(ended, "exists and was not made by draftsmith: it is left alone; choose another place")
    assert (tmp_path / "run" / "prompts" / "thesis.tex").read_text() == "years of work"


def test_a_run_folder_that_may_not_be_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe)
    refused(ended, f"{tmp_path / 'run'}: permission denied", "another folder")


def test_a_run_that_may_not_be_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.read_text

    def forbidden(path: Path, *arguments: Any, **more: Any) -> str:
        if path.name == "manifest.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", forbidden)
    for command in ("quickstart", "train", "report", "export"):
        refused(draftsmith(command, "--run", finished), "manifest.json: permission denied")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("{"), "manifest.json:1: not valid JSON"),
        (lambda path: path.write_text("{}"), "manifest.json is no manifest of draftsmith"),
        (lambda path: (path.parent / "conversations.jsonl").write_text("{}\n"), "where its manifest says"),
        (lambda path: (path.parent / "conversations.jsonl").unlink(), "conversations.jsonl is missing"),
        (lambda path: path.unlink(), "answers exists and was not made by draftsmith"),
    ],
)
def test_a_damaged_artefact(finished: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    spoil(tmp_path / "run" / "answers" / "manifest.json")
    recipe = tmp_path / "run" / "recipe.yaml"
    quickstart = ["quickstart", "--run", tmp_path / "run", "--recipe", recipe]
    line = refused(draftsmith(*quickstart), said, "answers")
    if "--redo" in line:
        ended = draftsmith(*quickstart, "--redo", "regenerate")
        assert ended.code == 0, ended.err
        assert artefacts.checksum(tmp_path / "run" / "answers") == artefacts.checksum(finished / "answers")
        assert "train: done before" in ended.out, "the answers are the same, and what was made from them is"


@pytest.mark.parametrize("value", ["yes", "-1", "0"])
def test_values_out_of_range_are_refused_before_a_run_begins(recipe: Path, tmp_path: Path, value: str) -> None:
    for option in ("regenerate.batch", "train.steps", "bench.max_new_tokens", "tune.growths.0.node_budget"):
        ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe, f"{option}={value}")
        refused(ended, option)
    assert not (tmp_path / "run").exists()


def test_layers_that_the_target_does_not_have(recipe: Path, tmp_path: Path) -> None:
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe, "drafter.layers=[2, 4, 8]")
    refused(ended, "drafter.layers", "a target with 8 layers")
    assert not (tmp_path / "run" / "scores").exists(), "said before the pass over all answers, not behind it"


def test_a_draft_vocabulary_larger_than_the_targets(recipe: Path, tmp_path: Path) -> None:
    ended = draftsmith("quickstart", "--run", tmp_path / "run", "--recipe", recipe, "drafter.draft_vocab_size=9000")
    assert ended.code in (0, 2)
    assert "Traceback" not in ended.err
    if ended.code == 0:
        config = artefacts.read_json(tmp_path / "run" / "drafter" / "config.json")
        assert config["options"]["draft_vocab_size"] == config["options"]["vocab_size"]


def test_every_recipe_option_here_is_known() -> None:
    """The recipe of these tests is what the others are compared with: it must be right itself."""
    assert "train" in RECIPE
