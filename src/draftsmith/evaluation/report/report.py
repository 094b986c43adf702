"""`write_report`: a run folder ▸ one self-contained HTML page, its figures beside it as PNG and SVG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from draftsmith import __version__
from draftsmith.evaluation import metrics
from draftsmith.evaluation.report import figures, views
from draftsmith.evaluation.report.inputs import Run, load
from draftsmith.evaluation.report.views import Pair
from draftsmith.evaluation.summary import Result, interval_text, lossless_text
from draftsmith.foundation.console import count, duration

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


def write_report(run: Path, out: Path) -> Path:
    """Write the report of a run.

    Args:
        run: the run's folder (report/inputs.py lists its files; each may be missing, and the page then says so).
        out: the page, if its name ends in `.html`, else the folder for `report.html`. `figures/` is made beside it.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder isn't there or holds nothing to report; a file in it is broken (file and row are named).
    """
    data = load(run)
    page = out if out.suffix == ".html" else out / "report.html"
    groups = views.groups(data)
    plots = figures.draw(data, groups)
    text = _render(data, groups, plots)
    page.parent.mkdir(parents=True, exist_ok=True)
    for plot in plots.values():
        plot.save(page.parent / "figures")
    unfinished = page.with_name(page.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, page)
    return page


def _render(run: Run, groups: Sequence[views.Group], plots: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("draftsmith.evaluation", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = run.summary.results if run.summary else []
    return environment.get_template("template.html.j2").render(
        title=_title(results),
        name=run.folder.resolve().name,
        when=str(run.provenance.get("time", ""))[:10],
        sections=SECTIONS,
        plots=plots,
        results=results,
        labelled=list(zip(views.result_labels(results), results, strict=True)),
        verdict=verdict(results),
        facts=_facts(run),
        missing=run.missing,
        selection_text=_selection_text(run),
        selected=views.selection_examples(run),
        borders=views.shade_borders(run.scores),
        groups=groups,
        owner_sets=[list(names) for names in dict.fromkeys(tuple(group.owners) for group in groups)],
        worst=views.worst_prompts(groups),
        missed=views.missed_tokens(groups),
        cost_text=_cost_text(run),
        stages=_stages(run),
        command=run.provenance.get("command", ""),
        versions=_flat({k: v for k, v in run.provenance.items() if k not in ("command", "facts")}),
        recipe=run.recipe,
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
    """Whether speculative answers equalled plain ones, over all results."""
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


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was trained on what: the provenance's own facts, then what the other files tell."""
    facts = [(str(term), str(value)) for term, value in (run.provenance.get("facts") or {}).items()]
    if run.samples:
        kept = [s for s in run.samples if s.kept]
        text = f"{count(len(kept))} of {count(len(run.samples))} samples"
        if kept and all(s.tokens is not None for s in kept):
            text += f", {count(sum(s.tokens or 0 for s in kept))} answer tokens"
        facts.append(("Trained on", text))
    steps = [row for row in run.training if "loss" in row]
    if steps:
        text = f"{count(steps[-1]['step'])} steps"
        seconds = sum(float(row.get("seconds", 0)) for row in steps)
        speeds = sorted(float(row["positions_per_second"]) for row in steps if "positions_per_second" in row)
        if seconds:
            text += f" in {duration(seconds)}"
        if speeds:
            text += f", {count(round(speeds[len(speeds) // 2]))} positions per second"
        facts.append(("Training", text))
    checks = [row for row in run.training if "dev_acceptance_length" in row]
    if checks:
        best = max(checks, key=lambda row: float(row["dev_acceptance_length"]))
        length = f"acceptance length {best['dev_acceptance_length']:.2f} on dev"
        facts.append(("Checkpoint kept", f"step {count(best['step'])}: {length}, best of {len(checks)}"))
    for name in dict.fromkeys(r.set for r in run.summary.results) if run.summary else []:
        rows = [r for r in run.summary.results if r.set == name] if run.summary else []
        budgets = sorted({r.node_budget for r in rows if r.node_budget})
        parts = [
            f"{max(r.prompts or 0 for r in rows) or 'some'} prompts",
            "T = " + ", ".join(f"{t:g}" for t in sorted({r.temperature for r in rows})),
            " or ".join(dict.fromkeys(r.drafters for r in rows)),
            *([" or ".join(map(str, budgets)) + " nodes a round"] if budgets else []),
        ]
        facts.append((f"Measured on {name}", "; ".join(parts)))
    return facts


def _selection_text(run: Run) -> str:
    if not run.samples:
        return ""
    kept = sorted(s.score for s in run.samples if s.kept)
    text = f"{count(len(kept))} of {count(len(run.samples))} samples kept"
    return f"{text}: the flattest ones, from a mean flatness of {kept[0]:.4f} upward." if kept else f"{text}."


def _cost_text(run: Run) -> str:
    stages = run.summary.stages if run.summary else []
    if not stages:
        return ""
    dearest = max(stages, key=lambda s: s.seconds)
    total = sum(s.seconds for s in stages)
    return f"{duration(total)} in all; {dearest.name} took the most, {duration(dearest.seconds)}."


def _stages(run: Run) -> list[tuple[str, str, float]]:
    stages = run.summary.stages if run.summary else []
    total = sum(s.seconds for s in stages) or 1.0
    return [(s.name, duration(s.seconds), 100 * s.seconds / total) for s in stages]


def _pair_line(pair: Pair) -> str:
    counts = pair.counts
    parts = [f"{counts.tokens} tokens in {counts.rounds} rounds", f"τ {counts.acceptance_length:.2f}"]
    if pair.speedup is not None:
        parts.append(f"{pair.speedup:.2f}× plain")
    return " · ".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, "" if name == "versions" else f"{prefix}{name}: ")
        elif value not in (None, [], ""):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def _dash(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern % value
