"""The report's figures, each a function of the numbers it shows; None where a run hasn't got them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from draftsmith.evaluation import metrics
from draftsmith.evaluation.report import views
from draftsmith.evaluation.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    SERIES,
    STYLE,
    Plot,
    canvas,
)
from draftsmith.evaluation.report.inputs import Run
from draftsmith.evaluation.report.views import Group
from draftsmith.evaluation.summary import Result

MARKERS = "osD^vP"


def draw_results(results: Sequence[Result], groups: Sequence[Group]) -> dict[str, Plot]:
    """The figures of what was measured, by name; those without numbers are left out."""
    return _drawn(
        [
            lambda: speedup(results),
            lambda: speedup_by_prompt(groups),
            lambda: acceptance_by_depth(results),
            lambda: acceptance_by_context(groups),
            lambda: owners(groups),
            lambda: time_split(results),
        ]
    )


def draw_run(run: Run, method: str = "flatness") -> dict[str, Plot]:
    """The figures of how a run came about, by name; `method` is the one that chose its samples."""
    stages = [(s.name, s.seconds) for s in run.summary.stages] if run.summary else []
    return _drawn(
        [
            lambda: flatness_of_samples(run, method),
            lambda: flatness_of_tokens(run),
            lambda: loss(run.training),
            lambda: dev_acceptance([("", run.training)]),
            lambda: stage_costs(stages),
        ]
    )


def draw_together(named: Sequence[tuple[str, Run]]) -> dict[str, Plot]:
    """The figures that show several runs at once."""
    return _drawn([lambda: dev_acceptance([(name, run.training) for name, run in named])])


def _drawn(drawings: Sequence[Callable[[], Plot | None]]) -> dict[str, Plot]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        plots = [drawing() for drawing in drawings]
    return {plot.name: plot for plot in plots if plot is not None}


def speedup(results: Sequence[Result]) -> Plot | None:
    """Speed-up of each result with its interval."""
    if not results:
        return None
    figure, axes = canvas(0.75 + 0.42 * len(results))
    places = np.arange(len(results))[::-1]
    for place, result in zip(places, results, strict=True):
        s = result.speedup
        if s.low is not None and s.high is not None:
            axes.plot([s.low, s.high], [place, place], color=BLUE, linewidth=3, alpha=0.35, solid_capstyle="round")
        axes.plot([s.estimate], [place], "o", color=BLUE, markersize=7)
        axes.annotate(
            f"{s.estimate:.2f}×",
            (s.estimate, place),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
        )
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    highest = max(r.speedup.high or r.speedup.estimate for r in results)
    lowest = min(r.speedup.low or r.speedup.estimate for r in results)
    axes.set_xlim(min(0.9, lowest - 0.05), highest + 0.08)
    axes.set_ylim(-0.6, len(results) - 0.25)
    _rows(axes, places, views.result_labels(results))
    axes.set_xlabel("tokens per second ÷ plain decoding's")
    caption = "Dot: ratio of sums over all prompts. Bar: 95 % interval over prompts. Dashed: plain decoding."
    return Plot("speedup", "Speed-up over plain decoding", caption, figure)


def speedup_by_prompt(groups: Sequence[Group]) -> Plot | None:
    """Speed-up of each prompt."""
    spread = [(g.label, [p.speedup for p in g.pairs if p.speedup is not None]) for g in groups]
    spread = [(name, values) for name, values in spread if values]
    if not spread:
        return None
    figure, axes = canvas(0.75 + 0.42 * len(spread))
    for row, (_, values) in enumerate(spread):
        place = len(spread) - 1 - row
        # dots side by side where they would hide each other
        offsets = 0.22 * np.sin(2.4 * np.arange(len(values)))
        axes.plot(sorted(values), place + offsets, "o", color=BLUE, alpha=0.55, markersize=4.5, markeredgewidth=0)
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(-0.6, len(spread) - 0.25)
    _rows(axes, np.arange(len(spread))[::-1], [name for name, _ in spread])
    axes.set_xlabel("tokens per second ÷ plain decoding's")
    return Plot(
        "speedup-prompts", "Speed-up of each prompt", "How much prompts differ; left of the line, slower.", figure
    )


def flatness_of_samples(run: Run, method: str = "flatness") -> Plot | None:
    """Histogram of the samples' scores, kept and dropped."""
    kept = [s.score for s in run.samples if s.kept]
    dropped = [s.score for s in run.samples if not s.kept]
    if not kept:
        return None
    figure, axes = canvas(2.5)
    edges = np.histogram_bin_edges([*kept, *dropped], bins=min(40, max(10, len(run.samples) // 8)))
    axes.hist([dropped, kept], bins=edges, stacked=True, color=[GREY, BLUE], label=["dropped", "kept"], edgecolor=PAPER)
    axes.legend(reverse=True)
    axes.locator_params(axis="x", nbins=6)
    flat = method == "flatness"
    axes.set_xlabel("mean flatness of the answer's tokens" if flat else f"score by {method}")
    axes.set_ylabel("samples")
    caption = "The flatter the target's distribution over an answer, the more there is to learn from it."
    if not flat:
        caption = f"The score by which {method} ranks the samples."
    return Plot("flatness-samples", f"Samples by {method}", caption, figure)


def flatness_of_tokens(run: Run) -> Plot | None:
    """Histogram of the tokens' flatness, in kept and in dropped samples, on a logarithmic axis."""
    if not run.scores:
        return None
    chosen = {s.id for s in run.samples if s.kept}
    everything = np.array([v for s in run.scores for v in s.flatness if v > 0])
    if not len(everything):
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = canvas(2.5)
    edges = np.geomspace(everything.min(), max(everything.max(), everything.min() * 1.01), 41)
    sides = [("kept", BLUE, [s for s in run.scores if s.id in chosen])] if chosen else []
    sides.append(("dropped" if chosen else "all", GREY, [s for s in run.scores if s.id not in chosen]))
    for name, colour, samples in sides:
        values = [v for s in samples for v in s.flatness if v > 0]
        if values:
            weights = np.full(len(values), 100 / len(values))
            axes.hist(values, bins=edges, weights=weights, histtype="step", color=colour, linewidth=1.8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_plain)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_formatter("")
    axes.legend()
    axes.set_xlabel("flatness of a token")
    axes.set_ylabel("% of tokens")
    caption = "The peak at the left are tokens the target is sure of; both axes are logarithmic."
    return Plot("flatness-tokens", "Tokens by flatness", caption, figure)


def loss(training: Sequence[dict[str, Any]]) -> Plot | None:
    """Training loss of each unrolled step, smoothed."""
    rows = [row for row in training if "loss" in row]
    if len(rows) < 2:
        return None
    figure, axes = canvas(2.5)
    steps = np.array([row["step"] for row in rows])
    by_step = [row.get("loss_by_step") or [row["loss"]] for row in rows]
    depth = min(len(values) for values in by_step)
    for k in range(depth):
        values = _smooth(np.array([row[k] for row in by_step], dtype=float))
        name = f"step {k + 1}" if depth > 1 else "loss"
        axes.plot(steps, values, color=SERIES[k % len(SERIES)], label=name)
    axes.legend(ncols=2)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss per token")
    caption = "Unrolled step k drafts from its own step k - 1, as in decoding; running mean."
    return Plot("loss", "Training loss", caption, figure)


def dev_acceptance(named: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Plot | None:
    """Acceptance length on the dev answers during training, of one run or several."""
    lines = [(name, [row for row in rows if "dev_acceptance_length" in row]) for name, rows in named]
    lines = [(name, rows) for name, rows in lines if rows]
    if not lines:
        return None
    figure, axes = canvas(2.5 + (_legend_inches([name for name, _ in lines]) if len(lines) > 1 else 0))
    for i, (name, rows) in enumerate(lines):
        steps, lengths = [r["step"] for r in rows], [r["dev_acceptance_length"] for r in rows]
        colour = GREEN if len(lines) == 1 else SERIES[i % len(SERIES)]
        axes.plot(steps, lengths, marker=MARKERS[i % len(MARKERS)], color=colour, label=name)
        best = int(np.argmax(lengths))
        place = (steps[best], lengths[best])
        axes.annotate(f"{lengths[best]:.2f}", place, (0, 7), textcoords="offset points", ha="center", color=INK)
    axes.margins(y=0.18)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("tokens per round")
    if len(lines) > 1:
        _legend_below(axes)
    caption = "Replayed on stored dev answers; the best checkpoint is the one that is kept."
    return Plot("dev-acceptance", "Acceptance length on dev", caption, figure)


def acceptance_by_depth(results: Sequence[Result]) -> Plot | None:
    """α_d of each result."""
    results = [r for r in results if r.acceptance_by_depth]
    if not results:
        return None
    labels = views.result_labels(results)
    figure, axes = canvas(2.5 + _legend_inches(labels))
    for i, (name, result) in enumerate(zip(labels, results, strict=True)):
        depths = range(1, len(result.acceptance_by_depth) + 1)
        style = _line(i)
        axes.plot(depths, [100 * a for a in result.acceptance_by_depth], label=name, **style)
    axes.set_xticks(range(1, max(len(r.acceptance_by_depth) for r in results) + 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("depth")
    axes.set_ylabel("% accepted")
    _legend_below(axes)
    caption = "Of the rounds that accepted depth d - 1 and held a drafted token at depth d, how many accepted it."
    return Plot("acceptance-depth", "Acceptance by depth", caption, figure)


def acceptance_by_context(groups: Sequence[Group]) -> Plot | None:
    """Acceptance length by the number of tokens before the round."""
    edges = views.context_edges([g for group in groups for g in group.generations])
    if len(edges) < 2:
        return None
    figure, axes = canvas(2.5 + _legend_inches([group.label for group in groups]))
    names = [f"{a}–{b - 1}" for a, b in pairwise(edges)] + [f"{edges[-1]}+"]
    for i, group in enumerate(groups):
        buckets = metrics.by_context(group.generations, edges)
        places = [edges.index(start) for start, _ in buckets]
        style = _line(i)
        axes.plot(places, [c.acceptance_length for c in buckets.values()], label=group.label, **style)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=1)
    axes.set_xlabel("tokens before the round, prompt included")
    axes.set_ylabel("tokens per round")
    _legend_below(axes)
    caption = "Whether drafting holds up as the text grows longer."
    return Plot("acceptance-context", "Acceptance by position", caption, figure)


def owners(groups: Sequence[Group]) -> Plot | None:
    """Accepted tokens of each drafter, where several draft together."""
    groups = [g for g in groups if len(g.owners) > 1]
    if not groups:
        return None
    names = list(dict.fromkeys(name for g in groups for name in g.owners))
    figure, axes = canvas(0.8 + 0.42 * len(groups) + _legend_inches(names))
    places = np.arange(len(groups))[::-1]
    left = np.zeros(len(groups))
    shares = [_shares(g) for g in groups]
    for i, name in enumerate(names):
        share = np.array([own.get(name, 0.0) for own in shares])
        axes.barh(places, share, left=left, height=0.55, color=SERIES[i % len(SERIES)], label=name, edgecolor=PAPER)
        left += share
    _rows(axes, places, [g.label for g in groups])
    axes.set_xlabel("% of accepted drafted tokens")
    _legend_below(axes)
    return Plot("owners", "Who drafted what", "Accepted tokens by the drafter that proposed them.", figure)


def _shares(group: Group) -> dict[str, float]:
    """Percent of the accepted drafted tokens by drafter."""
    tokens = [sum(depths) for depths in metrics.by_owner(group.generations, len(group.owners))]
    return {name: 100 * n / max(1, sum(tokens)) for name, n in zip(group.owners, tokens, strict=True)}


def time_split(results: Sequence[Result]) -> Plot | None:
    """Milliseconds of a round by part, beside what plain decoding takes for as many tokens."""
    results = [r for r in results if r.draft_ms is not None and r.verify_ms is not None and r.rest_ms is not None]
    if not results:
        return None
    figure, axes = canvas(1.15 + 0.6 * len(results))
    places = 1.0 * np.arange(len(results))[::-1]
    left = np.zeros(len(results))
    parts = [("draft", ORANGE, "draft_ms"), ("verify", BLUE, "verify_ms"), ("rest", GREY, "rest_ms")]
    for name, colour, attribute in parts:
        width = np.array([getattr(r, attribute) for r in results], dtype=float)
        axes.barh(places + 0.19, width, left=left, height=0.34, color=colour, label=name, edgecolor=PAPER)
        left += width
    known = [
        (p, r.acceptance_length * r.plain_token_ms) for p, r in zip(places, results, strict=True) if r.plain_token_ms
    ]
    if known:
        bars = {"height": 0.34, "facecolor": "none", "edgecolor": MUTED, "linewidth": 1, "linestyle": (0, (3, 2))}
        axes.barh([p - 0.19 for p, _ in known], [ms for _, ms in known], label="plain, as many tokens", **bars)
    _rows(axes, places, views.result_labels(results))
    axes.set_xlabel("milliseconds")
    _legend_below(axes)
    caption = "One round, against the time that plain decoding takes for the tokens a round commits."
    return Plot("time-split", "A round, part by part", caption, figure)


def stage_costs(stages: Sequence[tuple[str, float]]) -> Plot | None:
    """Wall-clock time of each stage."""
    if not stages:
        return None
    figure, axes = canvas(0.7 + 0.27 * len(stages))
    places = np.arange(len(stages))[::-1]
    unit, divisor = ("minutes", 60.0) if sum(s for _, s in stages) > 180 else ("seconds", 1.0)
    times = np.array([seconds / divisor for _, seconds in stages])
    axes.barh(places, times, height=0.6, color=BLUE)
    for place, value in zip(places, times, strict=True):
        axes.annotate(
            f"{value:.1f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
        )
    _rows(axes, places, [name for name, _ in stages])
    axes.set_xlim(0, max(times) * 1.14 or 1)
    axes.set_xlabel(unit)
    return Plot("stages", "Time of each stage", "Everything the run spent, discarded work included.", figure)


def _rows(axes: Any, places: Sequence[float] | np.ndarray[Any, Any], names: Sequence[str]) -> None:
    axes.set_yticks(places, [_folded(name) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def _line(number: int) -> dict[str, Any]:
    """Colour and marker of a series; the second six are dashed."""
    dashes = (0, (4, 2)) if number // len(SERIES) % 2 else "solid"
    return {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)], "linestyle": dashes}


def _folded(name: str, longest: int = 24) -> str:
    """A long label on two lines, broken at a comma, and cut there: labels take their width from the drawing."""
    first, comma, last = name.rpartition(", ")
    lines = [f"{first},", last] if comma and len(name) > longest else [name]
    return "\n".join(line if len(line) <= longest + 4 else f"{line[: longest + 3]}…" for line in lines)


def _legend_columns(names: Sequence[str], most: int = 3) -> int:
    """As many columns as fit: a drawing is about 60 characters wide."""
    return max(1, min(most, 54 // (max(map(len, names), default=1) + 6)))


def _legend_inches(names: Sequence[str], most: int = 3) -> float:
    """The height that a legend below takes."""
    return 0.19 * -(-len(names) // _legend_columns(names, most))


def _legend_below(axes: Any, most: int = 3) -> None:
    names = axes.get_legend_handles_labels()[1]
    axes.figure.legend(loc="outside lower left", ncols=_legend_columns(names, most), columnspacing=1.4)


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Running mean over about a twentieth of the steps; at the ends over what there is."""
    window = max(1, len(values) // 20)
    kernel = np.ones(window)
    return np.asarray(np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same"))


def _plain(value: float, _: int) -> str:
    return f"{value:g}"
