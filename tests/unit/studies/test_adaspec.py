"""The AdaSPEC study on a random target: what is trained how long, what it is charged, and that all of it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.standalone import Standalone
from draftsmith.foundation import artefacts, options
from draftsmith.foundation.errors import UserError
from draftsmith.studies import drafts, grid
from draftsmith.studies.adaspec import Adaspec, AdaspecOptions
from draftsmith.studies.drafts import METHODS, canonical
from draftsmith.studies.rows import Row
from draftsmith.training.objectives.distillation import DistillationObjective
from tests.unit.studies.tiny_study import settings

K = 0.5
BATCH = 192
SELECTIVE = ("adaspec", "adaspec-checkpoint")
OTHERS = tuple(m for m in METHODS if m not in ("distillspec", *SELECTIVE) and not METHODS[m].mixed)
GRID: list[dict[str, Any]] = [
    {"methods": ["distillspec", *SELECTIVE], "keep": [K], "accounting": ["equal-epochs", "equal-tokens", "equal-cost"]},
    {"methods": list(OTHERS), "keep": [K], "accounting": ["equal-cost"]},
    {"methods": ["distillspec-mixed"]},
    {"methods": ["adaspec"], "keep": [1.0]},
    {"methods": ["adaspec"], "keep": [K], "losses": ["tv"]},
]


def study(folder: Path, out: str = "out", **changed: object) -> Adaspec:
    given = {
        **settings(folder),
        "study": "adaspec",
        "drafter": {"draft_vocab_size": 64, "standalone": {"keep_layers": 2}},
        "chains": [3, 1],
        "grid": GRID,
        **changed,
    }
    given["train"] = {
        "epochs": 1,
        "row_length": 96,
        "batch_positions": BATCH,
        "precision": "float32",
        "on_policy": {"max_new_tokens": 6, "replay_steps": 3},
    }
    del given["growths"]
    return Adaspec(options.validate(AdaspecOptions, given, "the test"), folder / out)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Adaspec:
    made = study(tmp_path_factory.mktemp("adaspec"))
    cells = len(made.settings())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "show", lambda *_, **__: None)  # once is enough
        assert grid.run(made, made.out) == grid.Progress(cells, cells)
    grid.show(made, grid.read_rows(made.out / "results" / grid.ROWS), made.out / "results", say=False)
    return made


@pytest.fixture(scope="module")
def rows(done: Adaspec) -> list[Row]:
    return grid.read_rows(done.out / "results" / grid.ROWS)


def one(rows: list[Row], method: str, accounting: str = "equal-epochs", keep: float = K, loss: str = "") -> Row:
    """A cell's row at temperature 0 with the first chain."""
    share = keep if METHODS[method].keeps_share else 1.0
    wanted = (method, canonical(method, accounting), share, loss or METHODS[method].loss or "forward-kl", 0.0, 3)
    found = [
        r for r in rows if (r.method, r.accounting, r.keep, r.extra["loss"], r.temperature, r.node_budget) == wanted
    ]
    assert len(found) == 1, wanted
    return found[0]


def number(row: Row, name: str) -> float:
    return float(row.extra[name])


def test_a_whole_study_gives_a_row_for_each_cell_temperature_and_length(done: Adaspec, rows: list[Row]) -> None:
    assert len(rows) == len(done.settings()) * 2 * 2
    assert {r.method for r in rows} == set(METHODS)
    for r in rows:
        assert r.target_passes == sum(r.rounds) > 0
        assert (r.growth, len(r.prompts), len(r.rejected)) == ("chain", 4, 4)
        assert r.acceptance_length == pytest.approx(sum(r.committed) / sum(r.rounds))
        accepted = sum(r.committed) - sum(r.rounds)
        assert r.alpha == pytest.approx(accepted / (accepted + sum(r.rejected)))
        assert 0 < number(r, "overlap") < 1
    names = {p.name for p in (done.out / "results").iterdir()}
    assert names >= {"rows.jsonl", "table.md", "cost-0.svg", "share.svg", "study.json"}
    text = (done.out / "results" / "table.md").read_text(encoding="utf-8")
    for title in ("equal epochs", "equal tokens", "Better at equal cost", "What training cost", "smallest ΔL", "tv"):
        assert title in text


def test_each_accounting_gives_what_it_says(done: Adaspec, rows: list[Row]) -> None:
    whole = done.school.positions("sums")
    plain = one(rows, "distillspec")
    steps, tokens = plain.training_steps, number(plain, "draft_tokens")
    assert tokens == whole
    adaspec = one(rows, "adaspec")
    assert (adaspec.training_steps, number(adaspec, "draft_tokens")) == (steps, tokens)
    assert (number(adaspec, "reference_tokens"), number(adaspec, "reference_passes")) == (tokens, steps)
    assert number(adaspec, "judged_tokens") == whole
    assert one(rows, "adaspec", "equal-tokens").training_steps == round(steps / K)
    # what costs the same differs by no more than half a step
    work = done.school.work("standalone", "sums")
    budget = number(adaspec, "training_work")
    assert budget == pytest.approx(2 * tokens * work.trained + whole * work.read)
    step = work.trained * BATCH
    for method in ("distillspec", "overlap", "survival", "distillspec-ema", "adaspec-overlap", "adaspec-checkpoint"):
        found = one(rows, method, "equal-cost")
        assert abs(number(found, "training_work") - budget) <= 1.5 * step + work.read * BATCH, method
    assert one(rows, "distillspec", "equal-cost").training_steps > 2 * steps
    assert one(rows, "adaspec-ema", "equal-cost").training_steps < one(rows, "distillspec", "equal-cost").training_steps
    assert one(rows, "adaspec-positive", "equal-cost").accounting == "equal-epochs"


def test_every_pass_is_charged(done: Adaspec, rows: list[Row]) -> None:
    whole = done.school.positions("sums")
    for r in rows:
        assert number(r, "target_texts") == len(done.corpus.groups["sums"])
        assert number(r, "target_tokens") >= whole
        assert number(r, "draft_passes") == r.training_steps
    assert number(one(rows, "distillspec"), "reference_tokens") == 0
    ema = one(rows, "adaspec-ema", "equal-cost")
    assert number(ema, "judged_tokens") == number(ema, "draft_tokens")
    mixed = one(rows, "distillspec-mixed")
    assert number(mixed, "written_tokens") > 0
    assert number(mixed, "target_tokens") > whole
    checkpoint = one(rows, "adaspec-checkpoint")
    assert (number(checkpoint, "reference_tokens"), number(checkpoint, "judged_tokens")) == (0, whole)
    work = done.school.work("standalone", "sums")
    looked = one(rows, "adaspec-overlap", "equal-cost")
    expected = work.trained * (number(looked, "draft_tokens") + number(looked, "reference_tokens"))
    expected += work.look * number(looked, "draft_tokens") + work.read * whole
    assert number(looked, "training_work") == pytest.approx(expected)
    assert number(looked, "work") == pytest.approx(expected + work.target * whole)
    assert looked.charged_positions * work.trained == pytest.approx(number(looked, "work"), rel=1e-3)


def test_multiply_adds_are_those_that_torch_counts(done: Adaspec) -> None:
    """Of matrix products with weights; attention's own are left out, and rows are padded to a multiple."""
    school = done.school
    draft = school.fresh("standalone", 0)
    objective = school.objective("standalone", draft, school.options)
    assert isinstance(objective, DistillationObjective)
    samples = [done.corpus.training[i] for i in done.corpus.groups["sums"]]
    batch = objective.collate([samples], draft.device)
    padding = batch.ids.numel() / batch.positions

    def counted(back: bool) -> float:
        with FlopCounterMode(display=False) as counter:
            (term,) = objective.losses(batch, ())
            if back:
                term.values.sum().backward()
        by_kind: Mapping[Any, int] = counter.get_flop_counts()["Global"]
        products = (torch.ops.aten.mm, torch.ops.aten.addmm)
        return sum(by_kind.get(kind, 0) for kind in products) / 2 / batch.positions / padding

    work = school.work("standalone", "sums")
    with torch.no_grad():
        assert counted(back=False) == pytest.approx(work.read, rel=0.1)
    assert counted(back=True) == pytest.approx(work.trained, rel=0.1)


def test_k_of_one_is_distillspec_bit_for_bit(done: Adaspec, rows: list[Row]) -> None:
    both = [one(rows, "distillspec"), one(rows, "adaspec", keep=1.0)]
    assert both[0].rounds == both[1].rounds
    (cell,) = (done.out / "cells").glob("adaspec-100-*.work")
    (plain,) = (done.out / "shared").glob("reference-sums-seed0-*")
    models = [load_drafter(place, done.target, torch.float32) for place in (cell / "drafter", plain / "reference")]
    for value, other in zip(*(model.model.parameters() for model in models), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(value, other)
    (half,) = (done.out / "cells").glob("adaspec-50-equal-epochs-sums-seed0-*.work")
    other = load_drafter(half / "drafter", done.target, torch.float32)
    assert isinstance(other, Standalone)
    assert any(
        not torch.equal(a, b) for a, b in zip(other.model.parameters(), models[0].model.parameters(), strict=True)
    )  # type: ignore[attr-defined]


def test_a_study_that_was_killed_in_a_training_ends_in_the_same_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [{"methods": ["distillspec", "adaspec", "adaspec-checkpoint"], "keep": [K]}]
    whole, broken = (study(tmp_path, out, grid=few) for out in ("whole", "broken"))
    grid.run(whole, whole.out)
    calls: list[str] = []
    real = drafts.train

    def dying(*args: object, **more: object) -> object:
        calls.append("training")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(drafts, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        grid.run(broken, broken.out)
    grid.run(study(tmp_path, "broken", grid=few), broken.out)
    assert len(calls) == 3

    def told(out: Path) -> list[dict[str, object]]:
        return [r.model_dump(exclude={"training_seconds"}) for r in grid.read_rows(out / "results" / grid.ROWS)]

    assert told(broken.out) == told(whole.out)


def test_heads_are_trained_by_the_same_methods_from_a_start_of_the_seed(tmp_path: Path) -> None:
    heads = [{"methods": ["distillspec", "adaspec"], "keep": [K], "drafter": "eagle3"}]
    made = study(tmp_path, grid=heads, seeds=[0, 1])
    grid.run(made, made.out)
    found = grid.read_rows(made.out / "results" / grid.ROWS)
    assert len(found) == 2 * 2 * 2 * 2
    assert {r.extra["drafter"] for r in found} == {"eagle3"}
    plain, adaspec = (next(r for r in found if r.method == m and r.seed == 0) for m in ("distillspec", "adaspec"))
    assert number(adaspec, "reference_tokens") == number(plain, "draft_tokens")
    first, second = (made.school.fresh("eagle3", seed).state_dict()["fc.weight"] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert any(t.title.startswith("EAGLE-3 heads") for t in made.tables(found))


def test_layers_are_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = study(tmp_path)
    chosen = made.school.drafter.standalone.keep_layers
    assert isinstance(chosen, tuple)
    assert len(chosen) == 2
    monkeypatch.setattr(drafts, "kept_layers", lambda *_: pytest.fail("chosen again"))
    assert study(tmp_path).school.drafter.standalone.keep_layers == chosen
    (file,) = (made.out / "shared").glob("layers-*.json")
    assert tuple(artefacts.read_json(file)) == chosen


def test_cells_that_train_the_same_are_one(tmp_path: Path) -> None:
    names = [s.name for s in study(tmp_path).settings()]
    assert "distillspec-100-equal-tokens-sums-seed0" not in names
    assert "adaspec-50-equal-cost-sums-seed0" not in names
    assert "adaspec-overlap-50-equal-cost-sums-seed0" in names
    assert "adaspec-50-equal-epochs-sums-tv-seed0" in names


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    for block, said in (
        ({"methods": ["ada"]}, "no method is called 'ada'"),
        ({"methods": ["adaspec"], "keep": [0.0]}, "not 0.0"),
        ({"methods": ["adaspec"], "losses": ["kl"]}, "kl"),
        ({"methods": ["adaspec"], "domains": ["maths"]}, "maths is none of the domains sums"),
        ({"methods": ["distillspec-mixed"], "accounting": ["equal-cost"]}, "what the draft's own texts will cost"),
    ):
        with pytest.raises(UserError, match=said):
            study(tmp_path, grid=[block])
    with pytest.raises(UserError, match="chains"):
        study(tmp_path, chains=[2, 2])
