"""The whole path on a tiny target, through the command line: what it leaves, what it does again, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftsmith import recipe
from draftsmith.commands import stage as commands
from draftsmith.data.features import FeatureStore
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.standalone import Standalone
from draftsmith.evaluation.summary import read_summary
from draftsmith.export.adapter import checker, target_card
from draftsmith.export.import_ import import_checkpoint
from draftsmith.export.push import machine_paths
from draftsmith.export.validate import check
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.pipeline import STAGES
from draftsmith.selection.samples import Selection
from draftsmith.target.model import load_target
from draftsmith.training import trainer
from tests.integration.command_line import Ended, draftsmith
from tests.integration.tiny_folder import write_recipe, write_target

# Their artefacts hold times that were measured, so no two of them are equal.
MEASURED = ("tune", "bench")


class Killed(BaseException):
    """Stands for a kill: no `except Exception` holds it back."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a recipe, and the run that `draftsmith quickstart` makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder / "recipe.yaml", write_target(folder / "target"))
    ended = quickstart(folder / "run")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside the same target and recipe, to be spoilt."""
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.copy(root / "recipe.yaml", tmp_path / "recipe.yaml")
    return tmp_path / "run"


def quickstart(run: Path, *more: object) -> Ended:
    return draftsmith("quickstart", "--run", run, "--recipe", run.parent / "recipe.yaml", *more)


def checksums(run: Path) -> dict[str, str]:
    return {
        name: artefacts.checksum(run / stage.folder) for name, stage in STAGES.items() if (run / stage.folder).exists()
    }


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and content."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def same(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one if one[name] == other.get(name)]


def test_every_artefact_is_there_and_whole(root: Path) -> None:
    for stage in STAGES.values():
        artefacts.opened(root / "run" / stage.folder, stage.kind)
    assert not list((root / "run").glob("*.partial"))
    assert not list((root / "run").glob("*/work"))
    answers = list(artefacts.read_jsonl(root / "run" / "answers" / "conversations.jsonl"))
    assert len(answers) == 2 * (6 + 2)
    complete = [row["answer"]["complete"] for row in answers]
    assert set(complete) == {True, False}, "the tiny target should end some answers and not all"
    lengths = {len(row["answer"]["token_ids"]) for row in answers}
    assert lengths >= {1, 12}, "one-token answers, which teach nothing, and cut ones should both occur"


def test_the_summary_keeps_its_schema(root: Path) -> None:
    read_summary(root / "run" / "summary.json")
    summary = artefacts.read_json(root / "run" / "summary.json")
    assert summary["schema"] == 1
    assert [stage["name"] for stage in summary["stages"]] == [*STAGES, "report and export"]
    assert all(stage["seconds"] > 0 for stage in summary["stages"])
    assert [row["set"] for row in summary["results"]] == ["word-problems", "chat"]
    for row in summary["results"]:
        assert row["drafters"] == "eagle3"
        assert row["temperature"] == 0.0
        assert row["lossless"] == {"checked": 2, "equal": 2, "near_ties": 0}
        assert row["speedup"].keys() == {"estimate", "low", "high"}
        for name in ("acceptance_length", "round_cost", "plain_tokens_per_second", "tokens_per_second"):
            assert row[name] > 0
        assert isinstance(row["acceptance_by_depth"], list)


def test_the_report_and_the_export_are_usable(root: Path) -> None:
    page = (root / "run" / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "</html>" in page
    target = load_target(root / "target", "float32")
    card = target_card(target, str(root / "target"))
    embeddings = target.embedding.float()
    found = check(root / "run" / "export" / "vllm", card, embeddings=embeddings, forward=checker(target))
    assert [str(finding) for finding in found if finding.severity == "error"] == []


def test_how_many_tokens_to_serve_with(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.tokens(root / "run", None, [], 3)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["none", "1", "2", "3"]
    assert "num_speculative_tokens" in out or "leave speculation off" in out


def test_what_is_pushed_names_nothing_of_this_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, to the hub's door: the target needs a public name, and then no file names a path."""
    seen: dict[str, str] = {}

    def push(folder: Path, hub_id: str, *, private: bool) -> str:
        assert machine_paths(folder) == []
        seen.update({path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json")})
        return f"https://hub.example/{hub_id}?private={private}"

    monkeypatch.setattr("draftsmith.finish.push", push)
    with pytest.raises(UserError, match="export.target_id"):
        commands.export(root / "run", None, [], ["vllm"], "me/drafter")
    said = ["export.target_id=me/target", "export.licence=mit", "export.target_licence=cc0-1.0"]
    commands.export(root / "run", None, said, ["vllm"], "me/drafter")
    for line in ('license: "mit"', "- this drafter: mit", "- target: cc0-1.0", "- training data: apache-2.0 (draft"):
        assert line in seen["README.md"]
    assert '"model": "me/drafter"' in seen["README.md"]
    assert "vllm serve me/target" in seen["README.md"]
    assert str(root) not in "".join(text for name, text in seen.items() if name != "provenance.json")
    with pytest.raises(UserError, match="give one --to"):
        commands.export(root / "run", None, [], ["vllm", "sglang"], "me/drafter")


@pytest.mark.parametrize("kind", ["eagle", "hass"])
def test_other_heads_go_the_whole_way(root: Path, tmp_path: Path, kind: str) -> None:
    """Trained, tuned, decoded without a loss, exported for both servers, and read back from there."""
    shutil.copy(root / "recipe.yaml", tmp_path / "recipe.yaml")
    ended = quickstart(tmp_path / "run", f"drafter.kind={kind}", "export.to=[vllm,sglang]", "train.seed=3")
    assert ended.code == 0, ended.err
    rows = read_summary(tmp_path / "run" / "summary.json").results
    assert [(row.drafters, row.lossless.equal) for row in rows] == [(kind, 2), (kind, 2)]
    terms = [row["terms"] for row in artefacts.read_jsonl(tmp_path / "run" / "training.jsonl") if "terms" in row]
    assert {name: len(values) for name, values in terms[0].items()} == (
        {"feature": 1, "tokens": 1} if kind == "eagle" else {"feature": 3, "tokens": 3}
    )
    target = load_target(root / "target", "float32")
    card, embeddings = target_card(target, str(root / "target")), target.embedding.float()
    trained = load_drafter(tmp_path / "run" / "drafter", target)
    for server in ("vllm", "sglang"):
        folder = tmp_path / "run" / "export" / server
        assert check(folder, card, embeddings=embeddings, forward=checker(target)) == []
        again = import_checkpoint(folder, card)
        assert all(
            torch.equal(again.tensors[name], t) for name, t in trained.tensors().items() if name in again.tensors
        )
        assert again.tensors.keys() == trained.tensors().keys() - {"d2t", "t2d"}


def test_a_standalone_draft_goes_the_whole_way(root: Path, tmp_path: Path) -> None:
    """Made of the target's layers, distilled on stored and on its own answers by AdaSPEC's tokens, decoded without a
    loss, exported, and run by transformers from there."""
    shutil.copy(root / "recipe.yaml", tmp_path / "recipe.yaml")
    options = [
        "drafter.kind=standalone",
        "drafter.standalone.keep_layers=3",
        "train.weights={name: delta-loss, fraction: 0.5, survival: true}",
        "train.loss=lk",
        "train.judge=forward-kl",
        "train.reference=trained",
        "train.on_policy={share: 0.5, max_new_tokens: 6}",
        "export.to=[transformers,vllm,sglang]",
    ]
    ended = quickstart(tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert "Writing model shards" not in ended.err
    rows = read_summary(tmp_path / "run" / "summary.json").results
    assert [(row.drafters, row.lossless.equal) for row in rows] == [("standalone", 2), ("standalone", 2)]
    cost = artefacts.read_json(tmp_path / "run" / "drafter" / "training.json")["cost"]
    assert cost["draft"]["trained"]["passes"] == 6
    assert cost["draft"]["written"]["tokens"] > 0
    assert cost["target"]["read"]["tokens"] > 0
    assert cost["reference"]["judged"]["tokens"] == cost["draft"]["trained"]["tokens"]
    assert cost["before"]["reference"]["draft"]["trained"]["passes"] == 6
    target = load_target(root / "target", "float32")
    trained = load_drafter(tmp_path / "run" / "drafter", target)
    assert isinstance(trained, Standalone)
    assert (trained.layers, trained.vocab.size) == (3, 64)
    for server in ("transformers", "vllm", "sglang"):
        draft = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / server)
        for one, other in zip(draft.parameters(), trained.model.parameters(), strict=True):
            assert torch.equal(one, other)
    ids = target.tokenizer("Count to ten.", return_tensors="pt")
    plain = target.model.generate(**ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(target.model.generate(**ids, do_sample=False, max_new_tokens=12, assistant_model=draft), plain)
    again = quickstart(tmp_path / "run", *options)
    assert again.out.count("done before") == len(STAGES) + 1
    other = quickstart(tmp_path / "run", *options, "drafter.standalone.keep_layers=2", "--redo", "train")
    assert other.code == 0, other.err
    assert "first a reference" in other.out, "a reference of three layers is none for two"


def test_a_head_writes_no_texts(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.copy(root / "recipe.yaml", tmp_path / "recipe.yaml")
    ended = quickstart(tmp_path / "run", "train.on_policy.share=0.5", "--redo", "train")
    assert ended.code == 2
    assert "drafter.kind=standalone" in ended.err


def test_running_it_again_does_nothing(root: Path) -> None:
    before = files(root / "run")
    ended = quickstart(root / "run")
    assert ended.code == 0
    for name in (*STAGES, "report and export"):
        assert f"{name}: done before\n" in ended.out
    assert "loading" not in ended.out, "nothing is to be done, so the target is not needed"
    assert "word-problems" in ended.out, "the table is shown again"
    assert files(root / "run") == before


@pytest.mark.parametrize(
    ("option", "value", "stage"),
    [("train.steps", 7, "train"), ("regenerate.sampling.seed", 1, "regenerate"), ("bench.max_new_tokens", 7, "bench")],
)
def test_a_changed_option_is_refused_by_name_before_anything_is_done(
    root: Path, option: str, value: int, stage: str
) -> None:
    before = files(root / "run")
    ended = quickstart(root / "run", f"{option}={value}")
    assert ended.code == 2
    assert f"{option} " in ended.err
    assert f"{value} now" in ended.err
    assert f"--redo {stage}" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert files(root / "run") == before, "a refused command may change nothing, the kept recipe neither"
    alone = draftsmith(stage, "--run", root / "run", f"{option}={value}")
    assert (alone.code, alone.err) == (2, ended.err)
    assert files(root / "run") == before


def test_an_option_of_an_earlier_stage_is_refused_by_a_later_one(root: Path) -> None:
    """`draftsmith train regenerate.max_new_tokens=…` would otherwise train on the old answers without a word."""
    ended = draftsmith("train", "--run", root / "run", "regenerate.max_new_tokens=11")
    assert ended.code == 2
    assert "answers was made with regenerate.max_new_tokens 12, and that is 11 now" in ended.err


def test_layers_make_the_store_stale(root: Path) -> None:
    ended = quickstart(root / "run", "drafter.layers=[1,3,5]")
    assert ended.code == 2
    assert "scores was made with drafter.layers not set, and that is [1, 3, 5] now" in ended.err


def test_threads_and_device_change_nothing(root: Path) -> None:
    ended = quickstart(root / "run", "target.threads=1", "target.device=auto")
    assert ended.code == 0
    assert "regenerate: done before" in ended.out


def test_redo_mends_a_stale_stage_and_what_was_made_from_it(copied: Path) -> None:
    before = checksums(copied)
    ended = quickstart(copied, "train.steps=4", "--redo", "train")
    assert ended.code == 0, ended.err
    after = checksums(copied)
    assert same(before, after) == ["prompts", "regenerate", "score", "select", "features"]
    assert artefacts.read_json(copied / "drafter" / "training.json")["steps"] == 4
    again = quickstart(copied, "train.steps=4")
    assert again.code == 0
    assert again.out.count("done before") == len(STAGES) + 1
    alone = draftsmith("train", "--run", copied, "--redo", "train.steps=5")
    assert alone.code == 0, alone.err
    assert artefacts.read_json(copied / "drafter" / "training.json")["steps"] == 5
    stale = quickstart(copied, "train.steps=5")
    assert stale.code == 2
    assert f"growth was made from another {copied / 'drafter'} than there is now" in stale.err


def test_redo_of_what_comes_out_the_same_leaves_the_rest(copied: Path) -> None:
    before = checksums(copied)
    ended = quickstart(copied, "--redo", "regenerate")
    assert ended.code == 0, ended.err
    assert checksums(copied) == before
    assert "train: done before" in ended.out
    assert "regenerate: done before" not in ended.out


def test_an_unknown_stage_to_redo_gets_the_nearest_name(root: Path) -> None:
    ended = quickstart(root / "run", "--redo", "trian")
    assert (ended.code, ended.err) == (2, "error: --redo trian: there is no such stage; did you mean train?\n")


def test_another_targets_artefacts_are_refused_by_name(root: Path, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_recipe(other / "recipe.yaml", write_target(other / "target", seed=1))
    assert quickstart(other / "run").code == 0
    own = load_target(root / "target", "float32")
    foreign = load_target(other / "target", "float32")

    with pytest.raises(StaleError, match=f"target is .{foreign.spec.fingerprint}. there and .{own.spec.fingerprint}"):
        load_drafter(other / "run" / "drafter", own)

    shutil.rmtree(copied / "scores")
    shutil.copytree(other / "run" / "scores", copied / "scores")
    ended = quickstart(copied)
    assert ended.code == 2
    assert f"{copied / 'scores'} was made from another {copied / 'answers'} than there is now" in ended.err

    # the same folder with other weights in it: nothing but the fingerprint tells
    shutil.rmtree(copied / "scores")
    shutil.copytree(root / "run" / "scores", copied / "scores")
    before = checksums(copied)
    (root / "target").rename(root / "away")
    try:
        shutil.copytree(other / "target", root / "target")
        for stage in ("score", "train", "tune", "bench"):
            ended = draftsmith(stage, "--run", copied, "--redo")
            assert ended.code == 2, stage
            said = f'target is "{own.spec.fingerprint}" there and "{foreign.spec.fingerprint}" now'
            assert said in ended.err, stage
    finally:
        shutil.rmtree(root / "target")
        (root / "away").rename(root / "target")
    assert checksums(copied) == before


def test_each_stage_alone_gives_what_the_whole_run_gives(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "recipe.yaml", tmp_path / "recipe.yaml")
    run = tmp_path / "run"
    for number, name in enumerate(STAGES):
        more = ["--recipe", tmp_path / "recipe.yaml"] if not number else []
        ended = draftsmith(name, "--run", run, *more)
        assert ended.code == 0, ended.err
        assert len(checksums(run)) == number + 1, "a stage's command runs that stage"
    whole, alone = checksums(root / "run"), checksums(run)
    assert [name for name in whole if name not in same(whole, alone)] == list(MEASURED)
    assert accepted(root / "run") == accepted(run)
    assert written(root / "run") == written(run)
    for command in ("report", "export"):
        ended = draftsmith(command, "--run", run)
        assert ended.code == 0, ended.err
    assert (run / "report.html").is_file()
    assert (run / "export" / "vllm" / "model.safetensors").read_bytes() == (
        root / "run" / "export" / "vllm" / "model.safetensors"
    ).read_bytes()


def accepted(run: Path) -> list[float]:
    """What `tune` found that is no time."""
    return [row["acceptance_length"] for row in artefacts.read_json(run / "growth" / "profile.json")["growths"]]


def written(run: Path) -> dict[tuple[str, str], list[int]]:
    """What `bench` found that is no time: every answer's tokens."""
    rows = artefacts.read_jsonl(run / "bench" / "bench.jsonl")
    return {(row["mode"], row["id"]): row["generation"]["token_ids"] for row in rows}


def test_a_stages_command_says_what_is_missing(root: Path, tmp_path: Path) -> None:
    ended = draftsmith("train", "--run", tmp_path / "run", "--recipe", root / "recipe.yaml")
    wanted = f"{tmp_path / 'run' / 'prompts'} is missing: run `draftsmith prompts --run {tmp_path / 'run'}` first"
    assert (ended.code, ended.err) == (2, f"error: {wanted}\n")
    ended = draftsmith("report", "--run", tmp_path / "nowhere")
    assert ended.code == 2
    assert "prompts is missing" in ended.err


@pytest.mark.parametrize("command", ["quickstart", "train"])
def test_the_plan_runs_nothing(root: Path, tmp_path: Path, command: str) -> None:
    recipe = root / "recipe.yaml"
    ended = draftsmith(command, "--run", tmp_path / "run", "--recipe", recipe, "--plan")
    assert ended.code == 0, ended.err
    assert "regenerate" in ended.out
    assert ("bench" in ended.out.split("Plan")[1]) == (command == "quickstart")
    assert list(tmp_path.iterdir()) == []
    before = files(root / "run")
    ended = draftsmith(command, "--run", root / "run", "--recipe", recipe, "--plan", "train.steps=7")
    assert ended.code == 0, ended.err
    assert "stale" in ended.out
    assert files(root / "run") == before


def test_features_of_what_is_kept_train_the_same_drafter(root: Path, tmp_path: Path) -> None:
    """Texts are read one by one here: among others a text's last bits depend on its batch."""
    runs = {store: tmp_path / store for store in ("all", "kept")}
    for store, run in runs.items():
        run.mkdir()
        shutil.copytree(root / "run" / "prompts", run / "prompts")
        options = [f"features.store={store}", "features.batch_positions=1", "regenerate.statistics=false"]
        for stage in ("regenerate", "score", "select", "features", "train"):
            ended = draftsmith(stage, "--run", run, "--recipe", root / "recipe.yaml", *options)
            assert ended.code == 0, ended.err
    kept = [
        row["id"] for row in artefacts.read_jsonl(runs["kept"] / "selection" / "selection.jsonl") if row.get("kept")
    ]
    stored = [row["id"] for row in artefacts.read_jsonl(runs["kept"] / "features" / "index.jsonl")]
    assert [i for i in stored if "/train/" in i] == kept
    assert sum("/dev/" in i for i in stored) == 4
    first = artefacts.load_tensors(runs["kept"] / "scores" / "shard-00000.safetensors")
    assert not any(name.startswith("hidden") for name in first), "the score pass stores statistics only"
    sums = {store: checksums(run) for store, run in runs.items()}
    assert sums["all"]["select"] == sums["kept"]["select"]
    assert sums["all"]["train"] == sums["kept"]["train"]


def test_what_was_scored_while_it_was_written_is_not_read_again(root: Path, copied: Path) -> None:
    """The same samples are kept as by a pass over the texts, and the same vocabulary is drafted."""
    passed = FeatureStore(root / "run" / "scores")
    ended = draftsmith("score", "--run", copied, "--redo", "features.store=kept")
    assert ended.code == 0, ended.err
    assert "there is nothing to read" in ended.out + ended.err
    seen = FeatureStore(copied / "scores")
    assert seen.ids == passed.ids
    for sample in seen:
        rows = sample.answer_rows
        assert rows.any()
        assert not sample.hidden
        for name, column in passed[sample.id].statistics.items():
            torch.testing.assert_close(sample.statistics[name][rows], column[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.expected(), passed.expected(), rtol=1e-4, atol=1e-6)
    for stage in ("select", "features", "train"):
        ended = draftsmith(stage, "--run", copied, "--redo", "features.store=kept")
        assert ended.code == 0, ended.err
    kept, wanted = (
        Selection.from_rows(artefacts.read_jsonl(run / "selection" / "selection.jsonl")).kept
        for run in (copied, root / "run")
    )
    assert kept == wanted
    assert set(FeatureStore(copied / "features").ids) == {*kept, *(i for i in passed.ids if "/dev/" in i)}


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kills training right after its n-th state was saved, and saves one after every step."""
    left = [0]
    save = trainer._Training._save

    def counted(self: trainer._Training, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(trainer._Training, "_save", counted)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    return left


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_goes_on_exactly(copied: Path, killed_after: list[int], ema: float) -> None:
    """Killed once after every step, between and at evaluations, it ends in the same bits."""
    options = [f"train.ema={ema}"]
    killed_after[0] = 1_000
    assert draftsmith("train", "--run", copied, "--redo", *options).code == 0
    undisturbed = artefacts.checksum(copied / "drafter")
    log = [row.get("loss") for row in artefacts.read_jsonl(copied / "training.jsonl")]
    shutil.rmtree(copied / "drafter")
    for _ in range(6):
        killed_after[0] = 1
        with pytest.raises(Killed):
            draftsmith("train", "--run", copied, *options)
        assert not (copied / "drafter").exists()
    killed_after[0] = 1_000
    ended = draftsmith("train", "--run", copied, *options)
    assert ended.code == 0, ended.err
    assert "going on from step 6" in ended.out
    assert artefacts.checksum(copied / "drafter") == undisturbed
    assert [row.get("loss") for row in artefacts.read_jsonl(copied / "training.jsonl")] == log
    assert list(copied.glob("drafter*")) == [copied / "drafter"]
    assert not (copied / "drafter" / "work").exists()


def test_a_time_box_is_kept_to_when_training_goes_on(
    copied: Path, killed_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of steps is fixed once, before training: a run that goes on does not time itself again."""
    monkeypatch.setattr(trainer, "OVERRUN", float("inf"))  # so small a box is overrun at once
    options = ["train.steps=null", "train.seconds=0.01"]
    killed_after[0] = 2
    with pytest.raises(Killed):
        draftsmith("train", "--run", copied, "--redo", *options)
    work = artefacts.partial(copied / "drafter") / artefacts.WORK
    artefacts.write_json(work / "steps.json", 17)
    killed_after[0] = 1_000
    assert draftsmith("train", "--run", copied, "--redo", *options).code == 0
    assert artefacts.read_json(copied / "drafter" / "training.json")["steps"] == 17


@pytest.mark.parametrize("content", ["", "[1]", '{"train": "long"}', '{"train": -5}'])
def test_lost_stage_times_break_nothing(copied: Path, content: str) -> None:
    (copied / "stages.json").write_text(content)
    (copied / "finished.json").write_text(content)
    ended = quickstart(copied)
    assert ended.code == 0, ended.err
    read_summary(copied / "summary.json")


def test_the_kept_recipe_is_what_a_stages_command_uses(copied: Path, tmp_path: Path) -> None:
    """Not the quick start's, unless one is named."""
    ended = draftsmith("train", "--run", copied)
    assert (ended.code, "train: done before" in ended.out) == (0, True), ended.err
    ended = draftsmith("train", "--run", copied, "--recipe", "quickstart")
    assert ended.code == 2
    train = json.dumps(recipe.load("quickstart").data.train)
    assert f"prompts was made with data.train 6, and that is {train} now" in ended.err


def test_an_imported_head_is_trained_further(root: Path, copied: Path, tmp_path: Path) -> None:
    """With what it accepted before; where nothing is learnt, the very head is what the run ends with."""
    target = load_target(root / "target", "float32", "cpu")
    here = ["--target", root / "target", "--out", tmp_path / "head"]
    assert draftsmith("import", root / "run" / "export" / "vllm", *here).code == 0
    start = f"drafter.start={tmp_path / 'head'}"
    ended = draftsmith("train", "--run", copied, "--redo", start, "train.learning_rate=1e-30", "train.weight_decay=0")
    assert ended.code == 0, ended.err
    rows = [row for row in artefacts.read_jsonl(copied / "training.jsonl") if "dev_acceptance_length" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert len({row["dev_acceptance_length"] for row in rows}) == 1
    assert "best checkpoint: step 0 of 6" in ended.out
    assert f"{rows[0]['dev_acceptance_length']:.3f} before" in ended.out
    before, after = (load_drafter(folder, target).tensors() for folder in (tmp_path / "head", copied / "drafter"))
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert draftsmith("train", "--run", copied, "--redo", start, "train.learning_rate=0.01").code == 0
    losses = [row["loss"] for row in artefacts.read_jsonl(copied / "training.jsonl") if "loss" in row]
    fresh = [row["loss"] for row in artefacts.read_jsonl(root / "run" / "training.jsonl") if "loss" in row]
    assert losses[0] < fresh[0]
    other = draftsmith("train", "--run", copied, "--redo", start, "drafter.draft_vocab_size=32")
    assert other.code == 2
    assert "drafter.start" in other.err
    assert "set drafter.draft_vocab_size=64" in other.err


def test_selection_by_what_a_drafter_lacks(copied: Path, root: Path) -> None:
    arguments = ["--run", copied, "--redo", "select.method=disagreement"]
    refused = draftsmith("select", *arguments)
    assert (refused.code, "needs a drafter to compare the target with" in refused.err) == (2, True)
    ended = draftsmith("select", *arguments, f"select.drafter={root / 'run'}")
    assert ended.code == 0, ended.err
    # the same by hand, from the distributions themselves
    target = load_target(str(root / "target"), "float32", "cpu")
    head = load_drafter(root / "run" / "drafter", target)
    assert isinstance(head, Eagle3)
    store = FeatureStore(copied / "scores")
    chosen = Selection.from_rows(artefacts.read_jsonl(copied / "selection" / "selection.jsonl"))
    compared = 0
    for name, score in chosen.scores.items():
        sample = store[name]
        mask = sample.mask.tolist()
        p = target.project(sample.hidden["final"]).softmax(-1)
        features = head.wants.gather(sample.hidden)
        assert features is not None
        lacks = []
        for t in range(len(mask) - 1):
            if not mask[t + 1]:
                continue
            if not mask[t] or not t:  # an answer's first token is the prefill's: nothing drafts it
                lacks.append(0.0)
                continue
            shown = torch.cat([torch.zeros_like(features[:1]), features[:t]])[None]
            q = head.observe(head.start(1, 64), sample.ids[None, : t + 1], shown, [t + 1]).log_q[0, 0].exp()
            lacks.append(1 - float(torch.minimum(p[t, head.vocab.target_ids], q).sum()))
            compared += 1
        assert score == pytest.approx(sum(lacks) / len(lacks), abs=2e-3)
    assert compared > 20


def test_training_in_rounds_needs_a_ranking(copied: Path) -> None:
    options = ["--run", copied, "--redo", "train.rounds=[1,0.5]", "train.steps=null", "train.epochs=2"]
    ended = draftsmith("train", *options)
    assert ended.code == 0, ended.err
    seen = [row for row in artefacts.read_jsonl(copied / "training.jsonl") if "loss" in row]
    assert len(seen) == artefacts.read_json(copied / "drafter" / "training.json")["steps"]
    assert draftsmith("select", "--run", copied, "--redo", "select.method=full", "select.ratio=null").code == 0
    assert draftsmith("features", "--run", copied, "--redo").code == 0
    refused = draftsmith("train", *options)
    assert (refused.code, "pruning rounds need ranked samples" in refused.err) == (2, True)


def test_the_cost_of_scores_is_said_and_nothing_is_written(root: Path) -> None:
    before = files(root / "run")
    ended = draftsmith("score", "--run", root / "run", "--cost")
    assert ended.code == 0, ended.err
    assert "its output layer (lm_head)" in ended.out
    assert "scoring and choosing take" in ended.out
    assert files(root / "run") == before
