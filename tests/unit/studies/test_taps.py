"""The TAPS study on a random target: what is trained, what is put together at which budgets, and that it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.decoding.building import Available, build
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.specification import parse
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import options
from draftsmith.foundation.errors import UserError
from draftsmith.studies import composed, grid, heads, taps_details, taps_results
from draftsmith.studies.composed import INTERLEAVED
from draftsmith.studies.grid import Setting
from draftsmith.studies.rows import Row
from draftsmith.studies.taps import Taps, TapsOptions
from tests.unit.studies.rows import row
from tests.unit.studies.tiny_study import data, settings

COMPOSITIONS = {
    "average": "average(sums,birds)",
    "route-confidence": "route:confidence(sums,birds)",
    "route-learned": "route:learned(sums,birds,router=dev)",
    "route-hedge": "route:hedge(sums,birds,feedback=path)",
    "merge-concat": "merge:concat(sums,birds)",
    "merge-trie": "merge:trie(sums,birds,ngram)",
    "merge-trie-calibrated": "merge:trie(sums,birds,ngram,calibrated=true)",
}
GROWTHS = [{"node_budget": 4, "depth": 3, "width": 2}, {"node_budget": 8, "depth": 3, "width": 2}]


PRESETS = sorted((Path(__file__).resolve().parents[3] / "studies" / "presets").glob("taps-*.yaml"))


def tiny(folder: Path, out: str = "out", **changed: Any) -> Taps:
    """Two domains with prompts and questions of their own."""
    given: dict[str, Any] = settings(folder)
    corpus = given["corpus"]
    sums = corpus["domains"]["sums"]
    birds = data(folder / "birds")
    for file in ("prompts", "tests"):
        path = birds / f"{file}.jsonl"
        text = path.read_text(encoding="utf-8").replace(f"{file}/", f"birds-{file}/")
        path.write_text(text.replace("plus", "bird").replace("colour", "tree"), encoding="utf-8")
    other = {"train": [str(birds / "prompts.jsonl")], "test": str(birds / "tests.jsonl")}
    given = {
        **given,
        "study": "taps",
        "corpus": {**corpus, "domains": {"sums": sums, "birds": other}, "train": 6},
        "growths": GROWTHS,
        "compositions": COMPOSITIONS,
        **changed,
    }
    del given["grid"]
    return Taps(options.validate(TapsOptions, given, "the test"), folder / out)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Taps:
    made = tiny(
        tmp_path_factory.mktemp("taps"),
        averages=[0.25],
        timed=["mixed", "merge-concat@8"],
        bench={"prompts": 1, "max_new_tokens": 6, "warmup": 0},
        sweep={"methods": ["sums"], "depths": [2, 3], "widths": [2]},
    )
    cells = 4 + len(COMPOSITIONS) + 1 + 1
    assert grid.run(made, made.out) == grid.Progress(cells, cells)
    return made


def rows_of(made: Taps) -> list[Row]:
    return grid.read_rows(made.out / "results" / grid.ROWS)


def test_a_whole_study_gives_a_row_for_each_method_budget_set_and_temperature(done: Taps) -> None:
    rows = [r for r in rows_of(done) if r.accounting != "wall-clock" and "sweep" not in r.extra]
    methods = ["sums", "birds", "mixed", "mixed-2x", *COMPOSITIONS, "average-0.25"]
    assert len(rows) == len(methods) * 2 * 2 * 3
    assert {r.method for r in rows} == set(methods)
    assert {(r.node_budget, r.temperature) for r in rows} == {(4, 0.0), (4, 1.0), (8, 0.0), (8, 1.0)}
    for r in rows:
        assert r.target_passes == sum(r.rounds) > 0
        assert float(r.extra["nodes"]) <= r.node_budget
        assert len(r.prompts) == (8 if r.domain == INTERLEAVED else 4)
    swept = [r for r in rows_of(done) if "sweep" in r.extra]
    assert {(r.method, r.extra["depth"], r.node_budget) for r in swept} == {("sums", 2, 4)}
    text = (done.out / "results" / "table.md").read_text(encoding="utf-8")
    for title in (
        "acceptance length, 4 nodes",
        "acceptance length, 8 nodes",
        "upper bounds",
        "calibration",
        "who drafts",
    ):
        assert title in text
    assert {p.name for p in (done.out / "results").iterdir()} >= {"taps-eagle3-0.svg", "rows.jsonl"}


def test_rows_are_the_replay_of_their_specification_at_the_budget(done: Taps) -> None:
    members = {n: done.drafter(n, "eagle3", 0)[0] for n in ("sums", "birds")}
    answers = {t.temperature: t for t in done.corpus.tests if t.domain == "birds"}[1.0]
    for method, spec, budget in (
        ("route-confidence", "route:confidence(sums@dynamic:8/3/2,birds@dynamic:8/3/2)", 8),
        ("merge-concat", "merge:concat(sums@dynamic:2/3/2,birds@dynamic:2/3/2)", 4),
        ("sums", "sums@dynamic:4/3/2", 4),
    ):
        generations = replay(build(spec, members), done.target.spec, answers.answers)
        wanted = [(metrics.count([g]).committed, metrics.count([g]).rounds) for g in generations]
        (found,) = (
            r
            for r in rows_of(done)
            if (r.method, r.node_budget, r.domain, r.temperature) == (method, budget, "birds", 1.0)
            and "sweep" not in r.extra
        )
        assert list(zip(found.committed, found.rounds, strict=True)) == wanted
        assert found.prompts == tuple(answers.ids)


def test_interleaved_rows_hold_the_domains_rounds_and_learning_routes_decode_them_in_order(done: Taps) -> None:
    rows = [r for r in rows_of(done) if (r.node_budget, r.temperature) == (4, 0.0) and "sweep" not in r.extra]
    for method in ("mixed", "merge-trie", "route-hedge"):
        own = {r.domain: r for r in rows if r.method == method and r.accounting != "wall-clock"}
        each = {
            f"{r.benchmark}:{p}": c
            for name, r in own.items()
            if name != INTERLEAVED
            for p, c in zip(r.prompts, zip(r.committed, r.rounds, strict=True), strict=True)
        }
        whole = own[INTERLEAVED]
        found = dict(zip(whole.prompts, zip(whole.committed, whole.rounds, strict=True), strict=True))
        assert found.keys() == each.keys()
        if method != "route-hedge":
            assert found == each
    hedge = [t for t in done.corpus.tests if t.temperature == 0.0]
    pairs = {f"{t.benchmark}:{i}": a for t in hedge for i, a in zip(t.ids, t.answers, strict=True)}
    composition = done._ready("route-hedge", "eagle3", 0, done.out / "again")(done.options.growths[0])
    order = next(r for r in rows if r.method == "route-hedge" and r.domain == INTERLEAVED)
    again = replay(composition, done.target.spec, [pairs[p] for p in order.prompts])
    assert tuple(metrics.count([g]).rounds for g in again) == order.rounds


def test_mixed_drafters_have_equal_parts_and_specialists_their_domain(done: Taps) -> None:
    groups = done.corpus.groups
    assert done.samples("sums") == groups["sums"]
    half = [len(groups["sums"][: round(len(groups["sums"]) / 2)]), round(len(groups["birds"]) / 2)]
    mixed = done.samples("mixed")
    assert [sum(i in groups[d] for i in mixed) for d in ("sums", "birds")] == half
    assert set(done.samples("mixed-2x")) == {*groups["sums"], *groups["birds"]}
    by_method = {r.method: r for r in rows_of(done) if r.accounting != "wall-clock"}
    both = by_method["sums"].training_positions + by_method["birds"].training_positions
    assert by_method["merge-trie"].training_positions == by_method["mixed-2x"].training_positions == both
    assert by_method["merge-trie"].extra["tokens"] == by_method["mixed-2x"].extra["tokens"]


def test_all_drafters_of_a_seed_begin_alike_and_train_once(done: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = (done.out / "shared" / "drafters").iterdir()
    assert sorted(p.name.split("-eagle3-seed0-")[0] for p in placed) == ["birds", "mixed", "mixed-2x", "sums"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(heads, "train", never)
    more = Taps(done.options.model_copy(update={"compositions": {"new": "merge:trie(sums,mixed)"}}), done.out)
    new = next(s for s in more.settings() if s.method == "new")
    assert len(more.run(new, done.out / "new")) == 2 * 2 * 3


def test_a_killed_study_ends_in_the_same_counts(done: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Taps(done.options.model_copy(update={"timed": ()}), done.out.parent / "broken")
    real, calls = heads.train, 0

    def dying(*args: Any, **more: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(heads, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        grid.run(broken, broken.out)
    again = Taps(broken.options, broken.out)
    grid.run(again, again.out)
    assert calls == 1 + 1 + 3

    def told(made: Taps) -> list[dict[str, object]]:
        clock = {"training_seconds", "pass_ratio"}
        return [r.model_dump(exclude=clock) for r in rows_of(made) if r.accounting != "wall-clock"]

    assert told(again) == told(done)


def test_wall_clock_rows_are_named_after_their_method_and_budget(done: Taps) -> None:
    rows = [r for r in rows_of(done) if r.accounting == "wall-clock"]
    assert {(r.method, r.node_budget) for r in rows} == {("mixed", 4), ("merge-concat", 8)}
    assert {r.benchmark for r in rows} >= {INTERLEAVED}
    assert all((r.speedup or 0) > 0 and float(r.extra["tokens_per_second"]) > 0 for r in rows)
    whole = next(r for r in rows if r.benchmark == INTERLEAVED and r.method == "mixed")
    parts = [r for r in rows if r.benchmark != INTERLEAVED and r.method == "mixed"]
    assert sum(whole.committed) == sum(sum(r.committed) for r in parts)
    table = next(t for t in done.tables(rows_of(done)) if t.title.endswith("speed-up"))
    assert [line[:2] for line in table.rows] == [["mixed", "4"], ["merge-concat", "8"]]


def test_a_composition_verifies_the_nodes_of_its_budget() -> None:
    growth = GrowthOptions(node_budget=7, depth=3, width=2)

    def at(line: str) -> str:
        spec: Any = composed.at_budget(parse(line), growth)
        return "/".join(str(m.growth.node_budget) for m in spec.members)

    assert at("merge:concat(a,b)") == "4/3"
    assert at("merge:concat(a,b,c)") == "3/2/2"
    assert at("merge:trie(a,b)") == at("route:entropy(a,b)") == "7/7"
    nested: Any = composed.at_budget(parse("merge:concat(route:confidence(a,b),c@chain:2)"), growth)
    assert [m.growth.node_budget for m in nested.members[0].members] == [4, 4]
    assert nested.members[1].growth.kind == "chain"
    assert str(composed.at_budget(parse("merge:trie(a,b)"), growth)) == "merge:trie(a,b,budget=7)"
    with pytest.raises(UserError, match="7 nodes can't be divided"):
        composed.at_budget(parse(f"merge:concat({','.join('abcdefgh')})"), growth)


def test_a_composition_of_more_nodes_is_refused(done: Taps) -> None:
    members = {n: Available(done.drafter(n, "eagle3", 0)[0]) for n in ("sums", "birds")}
    growth = GrowthOptions(node_budget=4, depth=3, width=2)
    with pytest.raises(UserError, match="verifies 9 nodes a round, the study compares at 4"):
        composed.composed(parse("merge:trie(sums,birds,budget=9)"), growth, members, None)
    assert isinstance(composed.composed(parse("sums"), growth, members, None), Single)


def test_the_best_of_each_prompt_is_picked_prompt_by_prompt() -> None:
    common = {"study": "taps", "domain": INTERLEAVED, "benchmark": INTERLEAVED, "extra": {"kind": "eagle3"}}
    rows = [
        row(**common, method="a", prompts=("x:1", "y:1"), committed=(10, 9), rounds=(5, 9)),
        row(**common, method="b", prompts=("x:1", "y:1"), committed=(10, 9), rounds=(8, 3)),
    ]
    picked = taps_details.chosen(rows, ["a", "b"], "best", lambda _, c: max(c, key=lambda m: c[m][0] / c[m][1]))
    assert [(r.method, r.committed, r.rounds) for r in picked] == [("best", (10, 9), (5, 3))]
    assert picked[0].acceptance_length == pytest.approx(19 / 8)
    assert taps_details.best_of(rows, ["a", "b"]) == "b"


def test_upper_bounds_lie_above_what_they_bound(done: Taps) -> None:
    rows = taps_details.shared_trees([r for r in rows_of(done) if r.accounting != "wall-clock"])
    table = taps_details.oracles(rows, ["sums", "birds"], list(done.options.drafters), "eagle3")
    found = {line[0]: float(line[1].split()[0]) for line in table.rows}
    routed = [r for r in rows if r.domain == INTERLEAVED and r.temperature == 0 and r.node_budget == 4]
    length = {r.method: r.acceptance_length or 0 for r in routed}
    each, of_round = f"{taps_details.PER_PROMPT}, specialists", f"{taps_details.PER_ROUND}, specialists"
    assert found[each] >= max(length["sums"], length["birds"], found[taps_details.BY_LABEL]) - 5e-4
    assert found[of_round] >= found[each] - 5e-4


def test_the_paper_s_merge_is_shown_at_twice_the_nodes() -> None:
    def at(method: str, nodes: int, length: int) -> Row:
        extra = {"kind": "hass", "depth": 5, "width": 4, "nodes": 4.0, "tokens": 1}
        return row(
            study="taps",
            method=method,
            node_budget=nodes,
            benchmark="gsm8k",
            extra=extra,
            committed=(length,),
            rounds=(1,),
        )

    rows = [at(m, n, 10 * n + i) for i, m in enumerate(("math", "merge-concat")) for n in (15, 30)]
    table = taps_results._paper(rows, 2, "hass")
    lines = {line[0]: line[1:] for line in table.rows}
    assert lines["math"] == ["150.00", "5.02"]
    assert lines["merge-concat"] == ["301.00", "5.42"]
    assert lines["chat"] == ["–", "4.09"]


@pytest.mark.parametrize("kind", ["eagle", "hass"])
def test_other_heads_are_trained_too(tmp_path: Path, kind: str) -> None:
    made = tiny(tmp_path, kinds=[kind], compositions={"merge-trie": "merge:trie(sums,birds)"}, keep_drafters=False)
    grid.run(made, made.out)
    assert {r.extra["kind"] for r in rows_of(made)} == {kind}
    assert not list((made.out / "shared" / "drafters").iterdir())


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    for changed, message in (
        ({"compositions": {"x": "merge:trie(sums,fish)"}}, "there is no fish; there are sums, birds, mixed, mixed-2x"),
        ({"compositions": {"sums": "merge:trie(sums,birds)"}}, "sums is a drafter's name"),
        ({"compositions": {"x": "route:learned(sums,birds,router=my.json)"}}, "write router=dev"),
        ({"mixed": [3]}, "3 specialists' worth, and there are 2"),
        ({"growths": [{"kind": "chain"}]}, "equal node budgets, which chain has none of"),
        ({"timed": ["merge-trie@5"]}, "none of the growths has 5 nodes"),
        ({"sweep": {"methods": ["nobody"]}}, "there is no nobody"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(tmp_path, **changed)


def test_settings_come_seed_by_seed_drafters_first(tmp_path: Path) -> None:
    made = tiny(tmp_path, seeds=[0, 1], compositions={"m": "merge:trie(sums,birds)"}, timed=["m"])
    assert [(s.method, s.seed) for s in made.settings()] == [
        *((m, 0) for m in ("sums", "birds", "mixed", "mixed-2x", "m", "wall-clock")),
        *((m, 1) for m in ("sums", "birds", "mixed", "mixed-2x", "m")),
    ]
    made.prepare()
    one, two = (made.identity(Setting(m, seed=0, extra={"kind": "eagle3"})) for m in ("m", "sums"))
    assert one["drafters"].keys() == {"sums", "birds"}  # type: ignore[attr-defined]
    other = tiny(tmp_path, "other", train={"epochs": 3, "row_length": 96, "batch_positions": 192})
    other.prepare()
    assert other.identity(Setting("sums", seed=0, extra={"kind": "eagle3"})) != two


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_say_how_long_they_take(path: Path, tmp_path: Path) -> None:
    checked = options.validate(TapsOptions, options.load_yaml(path), "the preset")
    assert "minute" in checked.expected or "hour" in checked.expected
    assert Taps(checked, tmp_path).settings()
    assert grid.find_preset("taps", path.stem.removeprefix("taps-")) == path
