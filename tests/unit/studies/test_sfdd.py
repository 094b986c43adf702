"""The SFDD study on a random target: what is chosen, how long is trained, and that all of it runs and goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.commands import study as command
from draftsmith.data.features import StoredSample
from draftsmith.foundation import artefacts, options
from draftsmith.foundation.errors import UserError
from draftsmith.studies import grid, heads
from draftsmith.studies.grid import Setting
from draftsmith.studies.sfdd import METHODS, Sfdd
from draftsmith.training import trainer
from draftsmith.training.batches import epoch_plan
from tests.unit.studies.tiny_study import settings, study

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted((ROOT / "studies" / "presets").glob("sfdd-*.yaml"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Sfdd:
    made = study(tmp_path_factory.mktemp("study"), seeds=[0, 1])
    assert grid.run(made, made.out) == grid.Progress(6, 6)
    return made


def test_a_whole_study_gives_a_row_for_each_cell_benchmark_and_temperature(done: Sfdd) -> None:
    rows = grid.read_rows(done.out / "results" / grid.ROWS)
    assert len(rows) == 6 * 2
    assert {(r.method, r.keep) for r in rows} == {("full", 1.0), ("random", 0.5), ("flatness", 0.5)}
    assert {r.temperature for r in rows} == {0.0, 1.0}
    for r in rows:
        # both turns of both questions
        assert len(r.prompts) == 4
        assert r.prompts[1].endswith("@2")
        assert r.target_passes == sum(r.rounds) > 0
        assert r.acceptance_length == pytest.approx(sum(r.committed) / sum(r.rounds))
        assert r.training_cost == 2 * r.training_positions
        assert r.pass_ratio == rows[0].pass_ratio > 0
    by_cell = {(r.method, r.seed): r for r in rows}
    assert by_cell["flatness", 0].scored_positions == by_cell["full", 0].extra["positions_total"]
    assert by_cell["random", 0].scored_positions == 0
    assert {p.name for p in (done.out / "results").iterdir()} >= {"rows.jsonl", "table.md", "cost-0.svg", "study.json"}
    assert "flatness" in (done.out / "results" / "table.md").read_text(encoding="utf-8")


def test_a_study_that_was_killed_in_a_training_ends_in_the_same_counts(
    done: Sfdd, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Sfdd(done.options, done.out.parent / "broken")
    calls = 0
    real = heads.train

    def dying(*args: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(heads, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        grid.run(broken, broken.out)
    grid.run(Sfdd(done.options, broken.out), broken.out)
    assert calls == 3 + 4

    def told(out: Path) -> list[dict[str, object]]:
        clock = {"training_seconds", "pass_ratio"}
        return [r.model_dump(exclude=clock) for r in grid.read_rows(out / "results" / grid.ROWS)]

    assert told(broken.out) == told(done.out)


def test_equal_epochs_see_each_sample_so_often_and_equal_steps_take_as_many_as_full(done: Sfdd) -> None:
    o = done.options.train
    half = done.chosen(Setting("flatness", keep=0.5)).kept
    lengths = dict(zip(done.corpus.training.ids, done.corpus.training.lengths, strict=True))
    plans = [epoch_plan([lengths[i] for i in half], o.row_length, o.batch_positions, 0, epoch) for epoch in (0, 1)]
    assert heads.positions_of(done.corpus, half, o) == 2 * sum(lengths[i] for i in half)
    first = [sum(lengths[half[i]] for row in rows for i in row) for rows in plans[0]]
    three = o.model_copy(update={"epochs": None, "steps": len(first) + 1})
    again = sum(lengths[half[i]] for row in plans[1][0] for i in row)
    assert heads.positions_of(done.corpus, half, three) == sum(first) + again
    rows = grid.read_rows(done.out / "results" / grid.ROWS)
    steps = {r.method: r.training_steps for r in rows if r.seed == 0}
    assert steps["full"] == heads.steps_of(done.corpus, done.corpus.train_ids, o)
    assert steps["flatness"] == sum(map(len, plans)) < steps["full"]


def test_seeds_change_the_start_the_batches_and_only_the_random_choice(done: Sfdd) -> None:
    first, second = (done.chosen(Setting("random", keep=0.5, seed=s)).kept for s in (0, 1))
    assert first != second
    assert len(first) == len(second) == round(len(done.corpus.train_ids) / 2)
    chosen = [done.chosen(Setting("flatness", keep=0.5, seed=s)).kept for s in (0, 1)]
    assert chosen[0] == chosen[1]
    a, b, c = (heads.fresh_head(done.corpus, done.vocab, seed).fc.weight for seed in (0, 1, 0))
    assert not a.equal(b)
    assert a.equal(c)


def test_flatness_keeps_the_flattest_and_batches_are_the_paper_s(done: Sfdd) -> None:
    def one_minus_cos(sample: StoredSample) -> list[float]:
        logits = done.target.project(sample.hidden["final"]).double()
        p = logits.softmax(-1)[sample.answer_rows]
        return (1 - p.sum(-1) / (p.norm(dim=-1) * p.shape[-1] ** 0.5)).tolist()

    values = {i: one_minus_cos(done.corpus.training[i]) for i in done.corpus.train_ids}
    ranked = sorted(values, key=lambda i: sum(values[i]) / len(values[i]))
    got = done.chosen(Setting("flatness", keep=0.5))
    assert set(got.kept) == set(ranked[: round(len(ranked) / 2)])

    batches = [done.corpus.train_ids[start : start + 4] for start in range(0, len(values), 4)]
    losses = []
    for number, batch in enumerate(batches):
        together = [v for i in batch for v in values[i]]
        losses.append((sum(together) / len(together), number))
    least = sorted(losses)[: round(0.34 * len(batches))]
    wanted = [i for _, number in sorted(least, key=lambda pair: pair[1]) for i in batches[number]]
    assert list(done.chosen(Setting("flatness-batch", keep=0.34)).kept) == wanted


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_chosen_by(done: Sfdd, method: str) -> None:
    found = done.chosen(Setting(method, keep=1.0 if method == "full" else 0.5))
    assert 0 < len(found.kept) <= len(done.corpus.train_ids)
    assert (len(found.kept) == len(done.corpus.train_ids)) == (method == "full")


def test_the_grid_s_order_is_by_seed_with_full_once(tmp_path: Path) -> None:
    blocks = [
        {"methods": ["full", "random"], "accounting": ["equal-epochs", "equal-steps"]},
        {"methods": ["random"], "keep": [0.5, 0.3]},
    ]
    found = [s.name for s in study(tmp_path, seeds=[0, 1], grid=blocks).settings()]
    assert found[:4] == [
        "full-100-equal-epochs-seed0",
        "random-50-equal-epochs-seed0",
        "random-50-equal-steps-seed0",
        "random-30-equal-epochs-seed0",
    ]
    assert len(found) == 8


def test_a_time_budget_ends_the_command_with_code_0_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(settings(tmp_path)), encoding="utf-8")
    real = trainer._Training.run

    def ringing(self: trainer._Training, *given: Any) -> object:
        signal.raise_signal(signal.SIGALRM)  # as if the time were up now
        return real(self, *given)

    def go(budget: str | None) -> str:
        command.study("sfdd", str(preset), tmp_path / "out", [], time_budget=budget, data=None, plan=False, table=False)
        return capsys.readouterr().out

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Training, "run", ringing)
        assert "3 of 3 cells left" in go("10m")
    assert "all 3 cells are done" in go(None)
    command.study("sfdd", str(preset), tmp_path / "out", [], time_budget=None, data=None, plan=True, table=False)
    assert capsys.readouterr().out.count("there") >= 3
    command.study("sfdd", str(preset), tmp_path / "out", [], time_budget=None, data=None, plan=False, table=True)
    assert "Acceptance length" in capsys.readouterr().out


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_say_how_long_they_take(path: Path, tmp_path: Path) -> None:
    name = path.stem.partition("-")[0]
    known = command.STUDIES[name]
    checked = options.validate(known.options, options.load_yaml(path), "the preset")
    assert checked.study == name
    assert "minute" in checked.expected or "hour" in checked.expected
    assert known.build(checked, tmp_path).settings()
    assert grid.find_preset(name, path.stem.removeprefix(f"{name}-")) == path


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no method is called 'flat'"):
        study(tmp_path, grid=[{"methods": ["flat"]}])
    with pytest.raises(UserError, match="not 1.5"):
        study(tmp_path, grid=[{"methods": ["random"], "keep": [1.5]}])
    with pytest.raises(UserError, match=r"the study sfdd has no such preset; there are .*cpu"):
        grid.find_preset("sfdd", "none")
    with pytest.raises(UserError, match="give a time such as 8m"):
        command.duration("soon")
    assert [command.duration(t) for t in ("8m", "90s", "1.5h", "30")] == [480, 90, 5400, 30]
    few = study(tmp_path, corpus={**study(tmp_path).options.corpus.model_dump(mode="json"), "train": 500})
    with pytest.raises(UserError, match="has 21 prompts of at most 600 characters, and 502 are wanted"):
        few.prepare()


def test_prompts_missing_from_the_data_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(tmp_path))
    corpus = study(tmp_path).options.corpus.model_dump(mode="json")
    corpus["domains"]["sums"]["train"] = ["nowhere.jsonl"]
    with pytest.raises(UserError, match=r"nowhere\.jsonl: that file is not in"):
        study(tmp_path, corpus=corpus).prepare()


def test_drafters_are_deleted_where_that_was_asked_for(tmp_path: Path) -> None:
    made = study(tmp_path, keep_drafters=False, grid=[{"methods": ["random"]}])
    grid.run(made, made.out)
    left = [p.name for p in (made.out / "cells").iterdir()]
    assert len(left) == 2
    assert not any(name.endswith(".work") for name in left)
    for name in left:
        artefacts.opened(made.out / "cells" / name, grid.KIND)


def test_methods_that_are_timed_have_a_speedup_at_the_first_seed(tmp_path: Path) -> None:
    bench = {"prompts": 2, "max_new_tokens": 8, "warmup": 0, "temperatures": [0.0]}
    made = study(tmp_path, timed=["flatness"], bench=bench, seeds=[0, 1], grid=[{"methods": ["flatness"]}])
    grid.run(made, made.out)
    rows = grid.read_rows(made.out / "results" / grid.ROWS)
    assert {(r.method, r.seed, r.temperature) for r in rows if r.speedup is not None} == {("flatness", 0, 0.0)}
    assert all((r.speedup or 1) > 0 for r in rows)
    speed = next(t for t in made.tables(rows) if t.title.startswith("Speed-up"))
    assert [line[0] for line in speed.rows] == ["flatness"]
    assert speed.rows[0][-1] == "2.62×"


def test_draft_aware_methods_charge_their_scout(tmp_path: Path) -> None:
    made = study(tmp_path, grid=[{"methods": ["disagreement"]}], scout=0.4)
    grid.run(made, made.out)
    rows = grid.read_rows(made.out / "results" / grid.ROWS)
    store = made.corpus.training
    lengths = dict(zip(store.ids, store.lengths, strict=True))
    whole = sum(lengths[i] for i in made.corpus.train_ids)
    scout = sum(lengths[i] for i in made.scout_samples)
    assert len(made.scout_samples) == round(0.4 * len(made.corpus.train_ids))
    assert {r.scout_positions for r in rows if r.method == "disagreement"} == {round(scout + whole / 3)}
    assert {r.scout_positions for r in rows if r.method == "full"} == {0}
    # kept: what the scout overlaps with least, rows that teach nothing counting as learnt
    means = {i: float(made.overlaps[i][store[i].answer_rows].mean()) for i in made.corpus.train_ids}
    ranked = sorted(means, key=lambda i: means[i])
    assert set(made.chosen(Setting("disagreement", keep=0.5)).kept) == set(ranked[: round(len(ranked) / 2)])
