"""The report is one file that refers to nothing outside, shows every section, and says what a run lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.unit.evaluation.synthetic_run import TEXTS, write_synthetic_run

from draftsmith.decoding.trace import Generation, Round
from draftsmith.evaluation.report import together, views
from draftsmith.evaluation.report.inputs import Answer, load
from draftsmith.evaluation.report.report import SECTIONS, verdict, write_report
from draftsmith.evaluation.summary import Lossless
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError

REFERENCES = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "formaction", "ping"}


class Page(HTMLParser):
    """What the tests ask of a page: references, ids, texts by section, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.styles: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.classes: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in REFERENCES:
                self.references.append(value or "")
            elif name == "style":
                self.styles.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name == "class":
                self.classes.append(value or "")
        if tag == "section":
            self._section = self.ids[-1]
            self.texts[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.styles.append(data)
        elif self._section:
            self.texts[self._section] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def html(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report")
    page = write_report(run, out)
    assert page == out / "report.html"
    assert [p.name for p in out.iterdir() if p.suffix == ".partial"] == []
    return page.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert len(page.references) > 20
    assert [r for r in page.references if not r.startswith("#") and r != "data:,"] == []
    for style in page.styles:
        assert "@import" not in style
        assert "url(" not in style.replace("url(#", "")
    assert not {"script", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert "http://" not in html
    assert "https://" not in html


def test_inner_references_lead_somewhere(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    wanted = {r[1:] for r in page.references if r.startswith("#")}
    wanted |= {part.split(")")[0] for part in html.split("url(#")[1:]}
    assert wanted <= set(page.ids)


def test_every_section_is_there_and_filled(html: str) -> None:
    page = Page(html)
    assert list(page.texts) == [name for name, _ in SECTIONS]
    assert all(len(text.split()) > 15 for text in page.texts.values()), {k: len(v) for k, v in page.texts.items()}
    assert "missing" not in page.classes
    expected = {
        "headline": ["95 % interval", "Nothing was lost: 30 of 32 answers", "2 part at a near tie"],
        "trained": ["SmolLM2-135M-Instruct", "200 of 400 samples", "240 steps", "step 240: acceptance length 2.24"],
        "selection": ["Samples by flatness", "Tokens by flatness", "kept", "dropped"],
        "curves": ["Training loss", "Acceptance length on dev"],
        "acceptance": ["Acceptance by depth", "Acceptance by position"],
        "speed": ["Speed-up of each prompt", "without loops", "7 of 8 (1 near tie)"],
        "time": ["draft", "verify", "rest", "plain token"],
        "examples": ["median acceptance", "The best of each set"],
        "worst": ["smallest acceptance", "corrected"],
        "cost": ["15 min 07 s in all; train took the most"],
        "reproduce": ["draftsmith run recipes/quickstart.yaml", "5.23.0", "keep: 0.5"],
        "words": ["τ without loops", "near tie"],
    }
    for section, phrases in expected.items():
        assert [p for p in phrases if p not in page.texts[section]] == [], section


def test_users_text_is_escaped(html: str) -> None:
    assert "Explain <b>briefly</b> & simply." in TEXTS["chat"][2][0]
    assert "Explain &lt;b&gt;briefly&lt;/b&gt; &amp; simply." in html
    assert "<b>briefly" not in html


def test_figures_lie_beside_and_follow_the_colour_scheme(html: str, run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "deep" / "page.html")
    assert page == tmp_path / "deep" / "page.html"
    drawn = {p.stem for p in (tmp_path / "deep" / "figures").glob("*.svg")}
    assert drawn == {p.stem for p in (tmp_path / "deep" / "figures").glob("*.png")}
    assert drawn == {i.removeprefix("figure-") for i in Page(html).ids if i.startswith("figure-") and "_" not in i}
    assert len(drawn) == 10
    for path in (tmp_path / "deep" / "figures").glob("*.svg"):
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")
    for part in html.split("<svg ")[1:]:
        svg = ElementTree.fromstring("<svg " + part[: part.index("</svg>") + 6])
        assert svg.get("role") == "img"
        assert svg.get("aria-label")
        inks = {s.strip() for e in svg.iter() for s in (e.get("style") or "").split(";") if "#" in s and "url" not in s}
        assert inks == set(), "a colour that ignores dark mode"
    assert page.read_text(encoding="utf-8") == html, "the same run has to give the same bytes"


def test_tokens_are_coloured_by_origin_and_depth(run: Path) -> None:
    data = load(run)
    (group, *_) = views.groups(data)
    answer = group.typical().answer
    spans = views.origin_spans(answer, ["eagle3"])
    assert "".join(s.text for s in spans).replace("⏎", "") == "".join(answer.pieces)
    rounds = answer.generation.rounds
    assert sum(s.style == "t" for s in spans) == 1 + sum(r.kept == r.committed for r in rounds)
    deep = [s for s in spans if s.style == "d0 k3"]
    assert len(deep) == sum(r.accepted >= 3 and r.kept >= 3 for r in rounds)
    assert deep
    assert {s.title for s in deep} == {"eagle3, depth 3"}


def test_flatness_shades_split_the_flatter_half_evenly(run: Path) -> None:
    data = load(run)
    borders = views.shade_borders(data.scores)
    shades = [s.style for sample in data.scores for s in views.flatness_spans(sample, borders)]
    assert shades.count("f0") / len(shades) == pytest.approx(0.5, abs=0.01)
    for k in range(1, 9):
        assert shades.count(f"f{k}") / len(shades) == pytest.approx(1 / 16, abs=0.01)
    examples = views.selection_examples(data)
    assert [kept for kept, _, _ in examples] == [True, True, False, False]


def test_missed_tokens_are_those_put_in_place_of_a_refused_one(run: Path) -> None:
    groups = views.groups(load(run))
    refused = sum(
        r.reached > r.accepted and r.kept == r.committed for g in groups for a in g.generations for r in a.rounds
    )
    missed = views.missed_tokens(groups, number=10_000, least=1)
    assert sum(m.missed for m in missed) == refused
    assert all(m.missed <= m.written for m in missed)
    few = views.missed_tokens(groups, number=3)
    assert [m.missed for m in few] == sorted((m.missed for m in missed if m.written >= 3), reverse=True)[:3]


def test_several_drafters_and_no_interval(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", drafters=2, prompts=1)
    page = Page(write_report(run, tmp_path).read_text(encoding="utf-8"))
    assert "Who drafted what" in page.texts["acceptance"]
    assert "eagle3-chat, by depth" in page.texts["examples"]
    assert "one prompt: no interval" in page.texts["headline"]
    assert any(c.startswith("d1 k") for c in page.classes)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("summary.json", {"headline", "speed", "time", "cost", "acceptance"}),
        ("bench.jsonl", {"examples", "worst", "acceptance"}),
        ("training.jsonl", {"curves"}),
        ("selection.json", {"selection"}),
        ("scores.jsonl", {"selection"}),
        ("provenance.json", {"reproduce"}),
    ],
)
def test_what_is_missing_is_said(run: Path, tmp_path: Path, name: str, sections: set[str]) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        if path.name != name:
            (copy / path.name).write_bytes(path.read_bytes())
    page = Page(write_report(copy, tmp_path).read_text(encoding="utf-8"))
    assert list(page.texts) == [s for s, _ in SECTIONS]
    said = {s for s, text in page.texts.items() if f"no {name}" in text or f"{name} has no" in text}
    silent = {"acceptance"} if name == "summary.json" else set()  # acceptance by position is still there
    assert said == sections - silent


def test_an_old_summary_alone_is_enough(tmp_path: Path) -> None:
    row = {
        "set": "chat",
        "temperature": 0.0,
        "drafters": "eagle3",
        "acceptance_length": 2.0,
        "acceptance_by_depth": [0.6, 0.5],
        "round_cost": 1.4,
        "speedup": {"estimate": 1.4, "low": 1.3, "high": 1.5},
        "plain_tokens_per_second": 50.0,
        "tokens_per_second": 70.0,
        "lossless": {"checked": 2, "equal": 1, "near_ties": 0},
    }
    artefacts.write_json(tmp_path / "summary.json", {"schema": 1, "results": [row], "stages": []})
    page = Page(write_report(tmp_path, tmp_path).read_text(encoding="utf-8"))
    assert "1 of 2 answers differ" in page.texts["headline"]
    assert "verdict bad" in page.classes
    assert "no draft_ms" in page.texts["time"]


def test_verdict(run: Path) -> None:
    results = load(run).summary.results  # type: ignore[union-attr]
    unchecked = [results[0].model_copy(update={"lossless": Lossless(checked=0, equal=0, near_ties=0)})]
    assert verdict(results).good
    assert not verdict(unchecked).good
    assert "Not checked" in verdict(unchecked).text


def test_parquet_scores(run: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = list(artefacts.read_jsonl(run / "scores.jsonl"))
    (tmp_path / "run").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "run" / "scores.parquet")
    assert load(tmp_path / "run").scores == load(run).scores


def test_bad_input_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path, tmp_path)
    rows = list(artefacts.read_jsonl(run / "bench.jsonl"))
    for change, message in (
        ({"origins": [0]}, "row 2 is not valid.*different lengths"),
        ({"generation": {}}, "row 2 is not valid.*'request'"),
    ):
        (tmp_path / "bench.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | change))
        with pytest.raises(UserError, match=f"bench.jsonl: {message}"):
            write_report(tmp_path, tmp_path)
    (tmp_path / "bench.jsonl").write_text('{"set": "s"}')
    with pytest.raises(UserError, match="row 1 lacks the field 'generation'"):
        write_report(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Two runs of which the second has two drafters and no training log."""
    folder = tmp_path_factory.mktemp("several")
    runs = [write_synthetic_run(folder / "a"), write_synthetic_run(folder / "b", drafters=2)]
    (runs[1] / "training.jsonl").unlink()
    page = write_report(runs, folder / "out")
    return page, Page(page.read_text(encoding="utf-8"))


def test_several_runs_side_by_side(several: tuple[Path, Page]) -> None:
    path, page = several
    assert list(page.texts) == [name for name, _ in SECTIONS]
    assert "2 runs side by side" in path.read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids)), "two figures have one id"
    assert [r for r in page.references if not r.startswith("#") and r != "data:,"] == []
    for section in ("trained", "selection", "cost", "reproduce"):
        assert page.texts[section].count("SmolLM2" if section == "trained" else "a") > 0
    drawn = {p.stem for p in (path.parent / "figures").glob("*.svg")}
    assert {"run1-flatness-samples", "run2-flatness-samples", "run1-loss", "run1-stages", "run2-stages"} <= drawn
    assert {"speedup", "acceptance-depth", "dev-acceptance", "owners", "time-split"} <= drawn
    assert "run2-loss" not in drawn
    assert "No training curves" in page.texts["curves"]


def test_parts_of_a_composition() -> None:
    def a_round(owners: tuple[int, ...], drafted: tuple[int, ...], reached: int) -> Round:
        nodes, depth = sum(drafted), len(owners)
        return Round(0, nodes, reached, depth, depth + 1, depth + 1, owners, 10, 1.0, 1.0, 1.0, drafted)

    rounds = [
        a_round((0, 1), (3, 1), 2),
        a_round((), (0, 2), 1),
        a_round((1, 1, 1), (2, 4), 3),
        a_round((), (0, 0), 0),  # nothing drafted: no round to share
    ]
    answer = Generation(0, list(range(10)), "stop", rounds, 5.0, 20.0)
    pair = views.Pair(Answer("s", "a", "", 0.0, "both", True, answer, [], [], [], ("math", "chat")), None)
    math, chat = views.composition_shares(views.Group("s", 0.0, "both", [pair], True))
    assert math == ("math", pytest.approx(2 / 3), pytest.approx(5 / 12), pytest.approx(1 / 5), pytest.approx(1 / 5))
    assert chat == ("chat", 1.0, pytest.approx(7 / 12), pytest.approx(4 / 5), pytest.approx(4 / 7))
    # traces from before nodes were told apart: only who was accepted is known
    old = replace(answer, rounds=[replace(r, drafted=()) for r in rounds])
    told = views.Group("s", 0.0, "both", [replace(pair, answer=replace(pair.answer, generation=old))], True)
    assert [share[1:] for share in views.composition_shares(told)] == [(None, None, 0.2, None), (None, None, 0.8, None)]
    alone = replace(
        pair, answer=replace(pair.answer, members=(), drafters="eagle3", generation=replace(old, rounds=[]))
    )
    assert views.composition_shares(views.Group("s", 0.0, "eagle3", [alone], False)) == []


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_drawings_have_room_for_many_and_long_names(tmp_path: Path) -> None:
    folders = [write_synthetic_run(tmp_path / f"a rather long name of a run, number {n}") for n in range(5)]
    page = write_report(folders, tmp_path / "out")
    drawn = (page.parent / "figures" / "acceptance-depth.svg").read_text(encoding="utf-8")
    assert all(f"number {n}" in drawn for n in range(5))


def test_the_matrix_has_every_result_once(several: tuple[Path, Page], tmp_path: Path) -> None:
    path, page = several
    folder = path.parent.parent
    summaries = [load(folder / name).summary for name in "ab"]
    results = [r for summary in summaries if summary for r in summary.results]
    assert len(results) >= 4
    for result in results:
        assert f"{result.speedup.estimate:.2f}×" in page.texts["headline"]
    whole = together.merged({name: load(folder / name) for name in "ab"})
    assert whole.summary is not None
    assert sorted(r.speedup.estimate for r in whole.summary.results) == sorted(r.speedup.estimate for r in results)
    table = together.matrix(whole.summary.results)
    assert table.columns == ["a", "b"]
    for _, row in table.rows:
        best = table.best(row)
        assert best is not None
        assert best.speedup.estimate == max(r.speedup.estimate for r in row if r)


def test_runs_keep_their_own_plain_answers(several: tuple[Path, Page]) -> None:
    folder = several[0].parent.parent
    whole = together.merged({name: load(folder / name) for name in "ab"})
    alone = {name: views.groups(load(folder / name)) for name in "ab"}
    for group in views.groups(whole):
        own = next(g for g in alone[group.drafters] if (g.set, g.temperature) == (group.set, group.temperature))
        assert [pair.speedup for pair in group.pairs] == [pair.speedup for pair in own.pairs]
        assert group.owners == own.owners


def test_names_that_tell_folders_apart() -> None:
    assert together.names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert together.names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]
    assert together.names([Path("/x/run")]) == ["run"]
    assert len(set(together.names([Path("/x/run"), Path("/x/run")]))) == 2


def test_selection_is_told_as_it_was(run: Path, tmp_path: Path) -> None:
    page = Page(write_report(run, tmp_path).read_text(encoding="utf-8"))
    assert "from a mean flatness of" in page.texts["selection"]
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / "recipe.yaml").write_text("select: {method: entropy}", encoding="utf-8")
    page = Page(write_report(copy, tmp_path).read_text(encoding="utf-8"))
    assert "samples kept by entropy" in page.texts["selection"]
    assert "Samples by entropy" in page.texts["selection"]
    assert "mean flatness of" not in page.texts["selection"]


def test_what_another_engine_wrote_is_compared_with_its_own(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run")
    rows = list(artefacts.read_jsonl(run / "bench.jsonl"))
    plain = [row for row in rows if row["mode"] == "plain"]
    theirs = []
    for row in plain:
        generation = {**row["generation"], "total_ms": 2 * row["generation"]["total_ms"]}
        more = {"mode": "speculative", "generation": generation}
        theirs.append({**row, **more, "drafters": "transformers", "against": "plain"})
        theirs.append({**row, **more, "drafters": "assisted", "against": "transformers"})
    artefacts.write_jsonl(run / "bench.jsonl", [*rows, *theirs])
    groups = {g.drafters: g for g in views.groups(load(run))}
    assert [p.speedup for p in groups["transformers"].pairs] == pytest.approx([0.5] * len(groups["transformers"].pairs))
    assert [p.speedup for p in groups["assisted"].pairs] == pytest.approx([1.0] * len(groups["assisted"].pairs))
