"""What a run says of itself in sentences and tables: how it was trained, what was kept, what it cost, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from draftsmith.evaluation.report import views
from draftsmith.evaluation.report.drawing import Plot
from draftsmith.evaluation.report.inputs import Run, Scored
from draftsmith.foundation.console import count, duration


@dataclass(frozen=True)
class Part:
    """One run's own sections of a page.

    Attributes:
        name: the run's, as the page calls it.
        plots: by the names in figures.py, though the plots' own names differ where a page holds several runs.
        borders: between the shades of flatness.
        stages: name, time in words and share of each.
    """

    name: str
    missing: set[str]
    facts: list[tuple[str, str]]
    selection_text: str
    selected: list[tuple[bool, float, Scored]]
    score: str
    borders: list[float]
    plots: Mapping[str, Plot]
    cost_text: str
    stages: list[tuple[str, str, float]]
    command: str
    versions: list[tuple[str, str]]
    recipe: str


def tell(name: str, run: Run, plots: Mapping[str, Plot]) -> Part:
    """A run's own sections."""
    method = selection_method(run)
    return Part(
        name=name,
        missing=run.missing,
        facts=_facts(run),
        selection_text=_selection_text(run, method),
        selected=views.selection_examples(run),
        score="mean flatness" if method == "flatness" else f"score by {method}",
        borders=views.shade_borders(run.scores),
        plots=plots,
        cost_text=_cost_text(run),
        stages=_stages(run),
        command=str(run.provenance.get("command", "")),
        versions=_flat({k: v for k, v in run.provenance.items() if k not in ("command", "facts")}),
        recipe=run.recipe,
    )


def selection_method(run: Run) -> str:
    """What chose the samples, by the recipe; flatness where that says nothing."""
    try:
        recipe = yaml.safe_load(run.recipe)
        return str(recipe["select"]["method"])
    except (yaml.YAMLError, KeyError, TypeError):
        return "flatness"


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
        facts.append(("Steps", text))
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


def _selection_text(run: Run, method: str) -> str:
    if not run.samples:
        return ""
    kept = [s.score for s in run.samples if s.kept]
    dropped = [s.score for s in run.samples if not s.kept]
    text = f"{count(len(kept))} of {count(len(run.samples))} samples kept"
    if not kept or not dropped:
        return f"{text}."
    if method != "flatness":
        return f"{text} by {method}."
    if max(dropped) <= min(kept):
        return f"{text}: the flattest ones, from a mean flatness of {min(kept):.4f} upward."
    return f"{text}: the flattest ones, each set's ranked among themselves."


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, "" if name == "versions" else f"{prefix}{name}: ")
        elif value not in (None, [], ""):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
