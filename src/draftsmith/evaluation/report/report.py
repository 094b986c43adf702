"""`write_report`: a run folder ▸ one self-contained HTML page, its figures beside it as PNG and SVG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from draftsmith import __version__
from draftsmith.evaluation import metrics
from draftsmith.evaluation.report import figures, together, views
from draftsmith.evaluation.report.drawing import Plot
from draftsmith.evaluation.report.inputs import Run, load
from draftsmith.evaluation.report.telling import Part, selection_method, tell
from draftsmith.evaluation.report.views import Pair
from draftsmith.evaluation.summary import Result, interval_text, lossless_text

MOST_CARDS = 6  # results that are shown as cards: more are a table
SECTIONS = (
    ("headline", "Result"),
    ("trained", "Training"),
    ("selection", "Selection"),
    ("curves", "Curves"),
    ("acceptance", "Acceptance"),
    ("speed", "Speed-up"),
    ("time", "Time"),
    ("examples", "Examples"),
    ("worst", "Worst"),
    ("cost", "Cost"),
    ("reproduce", "Reproduce"),
    ("words", "Words"),
)
WORDS = (
    ("target", "the model that is made faster; its answers don't change"),
    ("drafter", "the small network that proposes tokens"),
    (
        "round",
        "draft a tree of tokens, verify it in one pass of the target, commit the accepted path and one token more",
    ),
    (
        "acceptance length τ",
        "committed tokens ÷ rounds, the target's own token included, before the cut at the answer's end",
    ),
    (
        "τ without loops",
        "without answers that hold the same eight tokens three times: these repeat themselves and draft too easily",
    ),
    ("round cost", "seconds of a round ÷ seconds of a plain token"),
    ("speed-up", "tokens per second ÷ plain decoding's, same engine, prompts and number format, prefill included"),
    (
        "acceptance at depth d",
        "of the rounds that accepted depth d - 1 and held a drafted token at depth d, those that accepted it",
    ),
    (
        "near tie",
        "answers that part where the target's two best tokens are closer than rounding: neither is wrong",
    ),
    (
        "flatness",
        "1 / (√V·‖p‖) for the target's distribution p over V tokens: small where it is sure, 1 where all are alike",
    ),
)


class Verdict(NamedTuple):
    """Whether anything was lost, in a sentence."""

    good: bool
    text: str


def write_report(run: Path | Sequence[Path], out: Path) -> Path:
    """Write the report of a run, or of several side by side.

    Args:
        run: a run's folder or several (report/inputs.py lists their files; each may be missing, and the page then says
            so).
        out: the page, if its name ends in `.html`, else the folder for `report.html`. `figures/` is made beside it.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder isn't there or holds nothing to report; a file in it is broken (file and row are named).
    """
    folders = [run] if isinstance(run, Path) else list(run)
    page = out if out.suffix == ".html" else out / "report.html"
    runs = [load(folder) for folder in folders]
    names = together.names(folders)
    whole = runs[0] if len(runs) == 1 else together.merged(dict(zip(names, runs, strict=True)))
    groups = views.groups(whole)
    results = whole.summary.results if whole.summary else []
    plots = figures.draw_results(results, groups)
    parts = []
    for number, (name, one) in enumerate(zip(names, runs, strict=True), start=1):
        own = figures.draw_run(one, selection_method(one))
        if len(runs) > 1:
            own.pop("dev-acceptance", None)  # all runs' are in one drawing
            own = {key: replace(plot, name=f"run{number}-{key}") for key, plot in own.items()}
        parts.append(tell(name, one, own))
    if len(runs) > 1:
        plots |= figures.draw_together(list(zip(names, runs, strict=True)))
    text = _render(whole, groups, plots, parts)
    page.parent.mkdir(parents=True, exist_ok=True)
    for plot in [*plots.values(), *(plot for part in parts for plot in part.plots.values())]:
        plot.save(page.parent / "figures")
    unfinished = page.with_name(page.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, page)
    return page


def _render(run: Run, groups: Sequence[views.Group], plots: Mapping[str, Plot], parts: Sequence[Part]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("draftsmith.evaluation", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = run.summary.results if run.summary else []
    several = len(parts) > 1
    return environment.get_template("template.html.j2").render(
        title=f"{len(parts)} runs side by side" if several else _title(results),
        name=", ".join(part.name for part in parts),
        when=str(run.provenance.get("time", ""))[:10],
        sections=SECTIONS,
        plots=plots,
        results=results,
        labelled=list(zip(views.result_labels(results), results, strict=True)),
        matrix=together.matrix(results) if several or len(results) > MOST_CARDS else None,
        verdict=verdict(results),
        parts=parts,
        several=several,
        most=MOST_CARDS,
        missing=run.missing,
        groups=groups,
        owner_sets=[list(names) for names in dict.fromkeys(tuple(group.owners) for group in groups)],
        compositions=[(group, found) for group in groups if (found := views.composition_shares(group))],
        worst=views.worst_prompts(groups),
        missed=views.missed_tokens(groups),
        words=WORDS,
        version=__version__,
        interval_text=interval_text,
        lossless_text=lossless_text,
        dash=_dash,
        loops=metrics.loops,
        pair_line=_pair_line,
        origin_spans=views.origin_spans,
        flatness_spans=views.flatness_spans,
    )


def verdict(results: Sequence[Result]) -> Verdict:
    """Whether speculative answers equalled plain ones, over all results of this engine."""
    results = [r for r in results if r.engine in (None, "draftsmith")]
    checked = sum(r.lossless.checked for r in results)
    different = sum(r.lossless.different for r in results)
    ties = sum(r.lossless.near_ties for r in results)
    if not checked:
        return Verdict(False, "Not checked: no answer was compared with plain decoding.")
    if different:
        text = (
            f"{different} of {checked} answers differ from plain decoding without a near tie to explain it. "
            "Unless a lossy mode was asked for, this is a bug."
        )
        return Verdict(False, text)
    equal = sum(r.lossless.equal for r in results)
    text = f"Nothing was lost: {equal} of {checked} answers equal plain decoding's, token by token"
    return Verdict(True, text + (f"; {ties} part at a near tie of the target's two best tokens." if ties else "."))


def _title(results: Sequence[Result]) -> str:
    if not results:
        return "A run without results yet"
    speeds = [r.speedup.estimate for r in results]
    low, high = f"{min(speeds):.2f}", f"{max(speeds):.2f}"
    return (
        f"{low} times the speed of plain decoding"
        if low == high
        else f"{low} to {high} times the speed of plain decoding"
    )


def _pair_line(pair: Pair) -> str:
    counts = pair.counts
    parts = [f"{counts.tokens} tokens in {counts.rounds} rounds", f"τ {counts.acceptance_length:.2f}"]
    if pair.speedup is not None:
        parts.append(f"{pair.speedup:.2f}× plain")
    return " · ".join(parts)


def _dash(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern % value
