"""Tables and figures of the SFDD study, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.studies.figures import Drawing, Point, lines, scatter
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Table, acceptance, cost, percent, relative, seconds, shown, where

# Average accepted length ℓ without the bonus token; τ = ℓ + 1. LLaMA3-8B-Instruct, EAGLE-2 on ShareGPT, one seed
# (tables 1, 2, 3 and 5 of the paper; "nll" is its perplexity). Its code selects batches of four samples.
PAPER: Mapping[float, Mapping[str, Mapping[float, float]]] = {
    1.0: {
        "full": {1.0: 2.78},
        "random": {0.7: 2.44, 0.6: 2.47, 0.5: 2.46, 0.4: 2.45, 0.3: 2.40, 0.2: 2.31, 0.1: 2.08, 0.05: 1.71},
        "entropy": {0.5: 2.49},
        "top-1": {0.7: 2.52, 0.6: 2.52, 0.5: 2.49, 0.4: 2.47, 0.3: 2.44},
        "margin": {0.5: 2.40},
        "energy": {0.5: 2.49},
        "nll": {0.5: 2.48},
        "flatness": {0.7: 2.58, 0.6: 2.56, 0.5: 2.56, 0.4: 2.55, 0.3: 2.49, 0.2: 2.39, 0.1: 2.14, 0.05: 1.79},
    },
    0.0: {
        "full": {1.0: 3.00},
        "random": {0.7: 2.68, 0.6: 2.68, 0.5: 2.69, 0.4: 2.66, 0.3: 2.60},
        "entropy": {0.5: 2.69},
        "top-1": {0.5: 2.66},
        "margin": {0.5: 2.61},
        "energy": {0.5: 2.66},
        "nll": {0.5: 2.69},
        "flatness": {0.7: 2.77, 0.6: 2.77, 0.5: 2.75, 0.4: 2.74, 0.3: 2.67},
    },
}
# Figure 4: training with selection, times shorter than on all samples.
PAPER_SHORTER = {
    "random": {0.7: 1.47, 0.6: 1.61, 0.5: 1.97, 0.4: 2.21, 0.3: 3.07},
    "flatness": {0.7: 1.64, 0.6: 1.88, 0.5: 2.02, 0.4: 2.43, 0.3: 3.20},
}
# Average speed-up at 50 % (tables 1 and 4).
PAPER_SPEED: Mapping[float, Mapping[str, float]] = {
    1.0: {"full": 2.49, "random": 2.20, "entropy": 2.20, "top-1": 2.23, "margin": 2.15, "energy": 2.21, "nll": 2.20,
          "flatness": 2.41},
    0.0: {"full": 2.80, "random": 2.41, "entropy": 2.47, "top-1": 2.44, "margin": 2.41, "energy": 2.43, "nll": 2.44,
          "flatness": 2.62},
}  # fmt: skip
ORDER = ("full", "random", "entropy", "top-1", "margin", "energy", "nll", "flatness")


def paper_length(method: str, keep: float, temperature: float) -> float | None:
    """The paper's τ, average over its five benchmarks."""
    found = PAPER.get(temperature, {}).get(_paper_name(method), {}).get(keep)
    return None if found is None else found + 1


def _paper_name(method: str) -> str:
    return "flatness" if method == "flatness-batch" else method


def ordered(rows: Sequence[Row]) -> list[str]:
    """The methods that there are, the paper's first."""
    there = {row.method for row in rows}
    return [m for m in ORDER if m in there] + sorted(there - set(ORDER))


def main_tree(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first tree that test answers were replayed with."""
    return where(rows, growth=rows[0].growth, node_budget=rows[0].node_budget) if rows else []


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each accounting and share: acceptance against full and random, by benchmark, and what training cost."""
    rows = main_tree(rows)
    full = where(rows, method="full")
    found: list[Table] = []
    for accounting in ("equal-epochs", "equal-steps"):
        here = where(rows, accounting=accounting, method=lambda m: m != "full")
        for keep in sorted({row.keep for row in here}, reverse=True):
            part = [*full, *where(here, keep=keep)]
            found += [_acceptance(part, accounting, keep), _benchmarks(part, accounting, keep)]
            found.append(_cost(part, accounting, keep))
            if any(row.speedup is not None for row in part):
                found.append(_speed(part, accounting, keep))
    return found


def _title(accounting: str, keep: float, what: str) -> str:
    return f"{what}: {keep:.0%} of the samples, {accounting.replace('-', ' ')}"


def _acceptance(rows: Sequence[Row], accounting: str, keep: float) -> Table:
    temperatures = sorted({row.temperature for row in rows})
    columns = ["method", "seeds"]
    for t in temperatures:
        columns += [f"τ, T={t:g}", "of full", "against random", "paper: of full", "paper: against random"]
    body = []
    for method in ordered(rows):
        mine = where(rows, method=method)
        line = [method, str(len({row.seed for row in mine}))]
        for t in temperatures:
            own, full, random = (where(rows, method=m, temperature=t) for m in (method, "full", "random"))
            line.append(shown(acceptance(own)))
            line.append("–" if method == "full" else percent(relative(own, full)))
            line.append("–" if method in ("full", "random") else percent(relative(own, random), less=1))
            paper = paper_length(method, 1.0 if method == "full" else keep, t)
            line += [_paper(paper, paper_length("full", 1.0, t), 0), _paper(paper, paper_length("random", keep, t), 1)]
        body.append(line)
    first = rows[0]
    note = (
        f"τ with 95 % intervals over seeds and prompts, replayed on stored answers ({first.growth} tree, "
        f"{first.node_budget} nodes); differences are paired by seed and prompt. The paper's τ is its ℓ + 1: one seed, "
        "LLaMA3-8B-Instruct, EAGLE-2, batches of four."
    )
    return Table(_title(accounting, keep, "Acceptance length"), columns, body, note)


def _paper(own: float | None, other: float | None, less: float) -> str:
    if own is None or other is None or own == other:
        return "–"
    return f"{100 * (own / other - less):{'+' if less else ''}.1f} %"


def _benchmarks(rows: Sequence[Row], accounting: str, keep: float) -> Table:
    sets = sorted({(row.domain, row.benchmark, row.temperature) for row in rows})
    columns = ["method", *(f"{benchmark}, T={t:g}" for _, benchmark, t in sets)]
    body = []
    for method in ordered(rows):
        line = [method]
        for domain, benchmark, t in sets:
            own, random = (
                where(rows, method=m, domain=domain, benchmark=benchmark, temperature=t) for m in (method, "random")
            )
            found = acceptance(own)
            beside = "" if method in ("full", "random") else f" ({percent(relative(own, random), less=1)})"
            line.append("–" if found is None else f"{found.estimate:.3f}{beside}")
        body.append(line)
    note = "τ by benchmark; in brackets the difference to random with its paired 95 % interval."
    return Table(_title(accounting, keep, "By benchmark"), columns, body, note)


def _cost(rows: Sequence[Row], accounting: str, keep: float) -> Table:
    columns = ["method", "answer tokens", "positions trained", "shorter: training", "with the target's pass"]
    columns += ["scoring ÷ full training", "seconds", "paper: shorter"]
    full = where(rows, method="full")
    body = []
    for method in ordered(rows):
        mine = where(rows, method=method)
        alone, with_pass = (_shorter(mine, full, charge) for charge in (False, True))
        whole, one = cost(full, charge=False), mine[0]
        scoring = one.scored_positions * one.pass_ratio / whole if whole and one.scored_positions else None
        paper = PAPER_SHORTER.get(_paper_name(method), {}).get(keep) if accounting == "equal-epochs" else None
        body.append(
            [
                method,
                f"{one.extra.get('tokens_kept', 0):,}",
                f"{cost(mine, charge=False) or 0:,.0f}",
                "–" if alone is None else f"{alone:.2f}×",
                "–" if with_pass is None else f"{with_pass:.2f}×",
                "–" if scoring is None else f"{scoring:.1%}",
                f"{seconds(mine):.0f}",
                "–" if paper is None else f"{paper:.2f}×",
            ]
        )
    note = (
        "Times shorter than on all samples, from positions: what the same machine left alone would take. A position "
        "that the target reads, to score it or for its features, is charged with the measured ratio of its seconds to "
        "a trained position's; the paper charges scoring and leaves the features out. Seconds: wall clock of training "
        "on a shared machine, median over seeds."
    )
    return Table(_title(accounting, keep, "Training cost"), columns, body, note)


def _speed(rows: Sequence[Row], accounting: str, keep: float) -> Table:
    timed = [row for row in rows if row.speedup is not None]
    sets = sorted({(row.benchmark, row.temperature) for row in timed})
    temperatures = sorted({t for _, t in sets})
    columns = ["method", *(f"{name}, T={t:g}" for name, t in sets), *(f"paper: average, T={t:g}" for t in temperatures)]
    body = []
    for method in ordered(timed):
        line = [method]
        for name, t in sets:
            found = [row.speedup for row in where(timed, method=method, benchmark=name, temperature=t)]
            line.append(f"{found[0]:.2f}×" if found else "–")
        paper = [PAPER_SPEED.get(t, {}).get(_paper_name(method)) if keep == 0.5 else None for t in temperatures]
        body.append(line + ["–" if speed is None else f"{speed:.2f}×" for speed in paper])
    note = "Speed-up over plain decoding by the wall clock, one seed, prompts interleaved; the paper's on LLaMA3-8B."
    return Table(_title(accounting, keep, "Speed-up"), columns, body, note)


def _shorter(rows: Sequence[Row], full: Sequence[Row], charge: bool) -> float | None:
    own, whole = cost(rows, charge), cost(full, charge)
    return whole / own if own and whole else None


def figures(rows: Sequence[Row]) -> list[Drawing]:
    """τ against training cost, and against the share kept where there are several."""
    rows = main_tree(rows)
    found: list[Drawing] = []
    reference = cost(where(rows, method="full"))
    for t in sorted({row.temperature for row in rows}):
        here = where(rows, temperature=t)
        points = []
        for method in ordered(here):
            groups = sorted({(row.keep, row.accounting) for row in where(here, method=method)})
            for keep, accounting in groups:
                mine = where(here, method=method, keep=keep, accounting=accounting)
                own = cost(mine)
                if reference and own:
                    same = ", equal steps" if accounting == "equal-steps" else ""
                    label = method if method == "full" else f"{method} {keep:.0%}{same}"
                    points.append(_point(label, own / reference, mine))
        known = [p for p in points if p is not None]
        if known:
            caption = "Up and left is better. The target's pass is charged; bars are 95 % intervals."
            title = f"Acceptance length against training cost, T={t:g}"
            found.append(scatter(f"cost-{t:g}", title, caption, known, "training cost ÷ that of all samples", "τ"))
        equal = where(here, accounting="equal-epochs", method=lambda m: m != "full")
        if len({row.keep for row in equal}) > 1:
            found.append(_by_share(here, equal, t))
    return found


def _by_share(rows: Sequence[Row], equal: Sequence[Row], temperature: float) -> Drawing:
    series = []
    for method in ordered(equal):
        shares = sorted({row.keep for row in where(equal, method=method)})
        points = [_point(method, 100 * keep, where(equal, method=method, keep=keep)) for keep in shares]
        series.append([p for p in points if p is not None])
    level = _point("full", 100.0, where(rows, method="full"))
    title = f"Acceptance length against the share kept, T={temperature:g}"
    return lines(
        f"share-{temperature:g}",
        title,
        "Equal epochs; bars are 95 % intervals over seeds and prompts.",
        [s for s in series if s],
        "samples kept, %",
        "τ",
        level,
    )


def _point(label: str, x: float, rows: Sequence[Row]) -> Point | None:
    found = acceptance(rows)
    return None if found is None else Point(label, x, found.estimate, found.low, found.high)
