"""Tables and figures of the TAPS study, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.studies import taps_details as details
from draftsmith.studies.composed import INTERLEAVED, WALL_CLOCK
from draftsmith.studies.figures import Drawing, Point, lines, ranked
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Table, acceptance, percent, relative, shown, where

# Acceptance length τ as printed (tables of README and paper; the authors' count is one round short an answer, which
# flatters by 0.5 to 3.5 %). LLaMA3-8B-Instruct, one seed: MT-Bench, GSM8K, MATH-500, SVAMP.
PAPER: Mapping[str, Mapping[float, Mapping[str, tuple[float, float, float, float]]]] = {
    "hass": {
        0.0: {
            "math": (2.90, 5.02, 5.35, 3.13),
            "chat": (3.98, 4.09, 3.98, 4.44),
            "mixed": (3.92, 4.77, 5.02, 4.15),
            "mixed-2x": (4.13, 5.53, 5.67, 5.38),
            "average": (2.29, 2.80, 3.12, 2.13),
            "route-confidence": (3.93, 5.01, 5.37, 4.89),
            "merge-concat": (4.05, 5.42, 5.65, 5.31),
        },
        1.0: {
            "math": (2.31, 4.75, 4.63, 2.46),
            "chat": (3.50, 4.03, 3.61, 3.95),
            "mixed": (3.46, 4.66, 4.47, 4.57),
            "mixed-2x": (3.17, 4.16, 3.42, 4.01),
            "average": (2.10, 2.78, 2.90, 2.69),
            "route-confidence": (3.51, 4.72, 4.55, 4.71),
            "merge-concat": (3.76, 5.21, 4.98, 5.05),
        },
    },
    "eagle": {
        0.0: {
            "math": (2.54, 5.04, 5.28, 4.81),
            "chat": (3.57, 3.72, 3.81, 3.71),
            "mixed": (3.37, 4.12, 4.44, 4.16),
            "mixed-2x": (3.75, 4.68, 4.85, 4.64),
            "average": (2.07, 2.53, 2.57, 2.50),
            "route-confidence": (3.63, 4.91, 5.25, 4.71),
            "merge-concat": (3.93, 5.32, 5.63, 5.25),
        },
        1.0: {
            "math": (2.43, 4.71, 4.61, 4.53),
            "chat": (3.38, 3.72, 3.43, 3.65),
            "mixed": (3.10, 4.08, 4.02, 4.03),
            "mixed-2x": (2.99, 3.76, 3.20, 3.08),
            "average": (2.01, 2.49, 2.42, 2.45),
            "route-confidence": (3.36, 4.65, 4.62, 4.46),
            "merge-concat": (3.55, 5.01, 4.79, 4.93),
        },
    },
}
BENCHMARKS = ("mt-bench", "gsm8k", "math-500", "svamp")


def tables(rows: Sequence[Row], domains: Sequence[str], drafters: Sequence[str]) -> list[Table]:
    """For each kind of head and node budget what drafters and compositions come to, and what explains it."""
    found: list[Table] = []
    for kind in dict.fromkeys(str(row.extra["kind"]) for row in rows):
        own = [row for row in rows if row.extra["kind"] == kind]
        replayed = where(own, accounting=lambda a: a != WALL_CLOCK)
        if not replayed:
            continue
        main = details.shared_trees(replayed)
        budgets = sorted({row.node_budget for row in main})
        for budget in budgets:
            here = where(main, node_budget=budget)
            found += [_acceptance(here, drafters, kind), _benchmarks(here, kind)]
        found += [_specialists(where(main, node_budget=budgets[0]), domains, kind), _paper(main, len(domains), kind)]
        found += [details.oracles(main, domains, drafters, kind), details.calibration(main, kind)]
        first = where(main, node_budget=budgets[0])
        found += [details.worst(first, drafters, kind), details.shares(first, kind), details.depths(first, kind)]
        found += [details.shapes(replayed, kind), details.speed(where(own, accounting=WALL_CLOCK), drafters, kind)]
    return [table for table in found if table.rows]


def _acceptance(rows: Sequence[Row], drafters: Sequence[str], kind: str) -> Table:
    temperatures = sorted({row.temperature for row in rows})
    methods = details.ordered(rows, drafters)
    best = {t: details.best_of(where(rows, temperature=t), [m for m in methods if m in drafters]) for t in temperatures}
    columns = ["method", "seeds", "answer tokens", "nodes verified"]
    for t in temperatures:
        columns += [f"τ, T={t:g}", f"against {best[t]}"]
    body = []
    for method in methods:
        mine = where(rows, method=method, domain=INTERLEAVED)
        if not mine:
            continue
        nodes = sum(float(row.extra["nodes"]) for row in mine) / len(mine)
        line = [method, str(len({row.seed for row in mine})), f"{mine[0].extra['tokens']:,}", f"{nodes:.1f}"]
        for t in temperatures:
            own = where(mine, temperature=t)
            single = where(rows, method=best[t], domain=INTERLEAVED, temperature=t)
            line.append(shown(acceptance(own)))
            line.append("–" if method == best[t] else percent(relative(own, single), less=1))
        body.append(line)
    note = (
        "τ on all test prompts interleaved, with 95 % intervals over seeds and prompts; differences, paired, are to "
        "the best single drafter, chosen on these very prompts. Answer tokens: what the drafters were trained on."
    )
    return Table(f"{details.HEADS[kind]}: acceptance length, {details.nodes_of(rows)} nodes", columns, body, note)


def _benchmarks(rows: Sequence[Row], kind: str) -> Table:
    sets = sorted({(row.benchmark, row.temperature) for row in rows if row.domain != INTERLEAVED})
    body = []
    for method in details.ordered(rows):
        line = [method]
        for benchmark, t in sets:
            found = acceptance(where(rows, method=method, benchmark=benchmark, temperature=t))
            line.append("–" if found is None else f"{found.estimate:.3f}")
        body.append(line)
    columns = ["method", *(f"{benchmark}, T={t:g}" for benchmark, t in sets)]
    return Table(f"{details.HEADS[kind]}: by benchmark, {details.nodes_of(rows)} nodes", columns, body)


def _specialists(rows: Sequence[Row], domains: Sequence[str], kind: str) -> Table:
    temperatures = sorted({row.temperature for row in rows})
    body = []
    for domain in domains:
        for t in temperatures:
            here = where(rows, domain=domain, temperature=t)
            others = {m: acceptance(where(here, method=m)) for m in domains if m != domain}
            known = {m: found.estimate for m, found in others.items() if found is not None}
            own = where(here, method=domain)
            if not own or not known:
                continue
            second = max(known, key=lambda m: known[m])
            better = relative(own, where(here, method=second))
            mixed = [percent(relative(own, where(here, method=m)), less=1) for m in ("mixed", "mixed-2x")]
            body.append([domain, f"{t:g}", shown(acceptance(own)), second, percent(better, less=1), *mixed])
    columns = ["domain", "T", "τ of its specialist", "best other", "against it", "against mixed", "against mixed-2x"]
    note = "Is each specialist best on its own domain? Paired by seed and prompt."
    return Table(
        f"{details.HEADS[kind]}: specialists at home, {details.nodes_of(rows)} nodes", columns, body, note, left=1
    )


def _paper(rows: Sequence[Row], merged: int, kind: str) -> Table:
    """The paper's methods at the paper's budgets: the merge verifies the nodes of all `merged` drafters."""
    budgets = sorted({row.node_budget for row in rows})
    sets = [b for b in BENCHMARKS if any(row.benchmark == b for row in rows)]
    temperatures = [t for t in sorted({row.temperature for row in rows}) if t in PAPER["eagle"]]
    papers = [kind] if kind in PAPER else ["eagle", "hass"]
    columns = ["method"]
    for t in temperatures:
        for name in sets:
            columns += [f"{name}, T={t:g}", *(f"paper: {details.HEADS[p]}" for p in papers)]
    body = []
    for method in PAPER["eagle"][0.0]:
        nodes = merged * budgets[0] if method == "merge-concat" else budgets[0]
        line = [method]
        for t in temperatures:
            for name in sets:
                asked = {"method": method, "benchmark": name, "temperature": t, "node_budget": nodes}
                found = acceptance(where(rows, **asked))
                line.append("–" if found is None else f"{found.estimate:.2f}")
                line += [f"{PAPER[p][t][method][BENCHMARKS.index(name)]:.2f}" for p in papers]
        body.append(line)
    note = (
        f"The paper's comparison: all with {budgets[0]} nodes (the paper: 60), merge-concat with "
        f"{merged * budgets[0]} (120). Its target is LLaMA3-8B-Instruct, its heads saw 70,000 samples 20 times."
    )
    return Table(f"{details.HEADS[kind]}: the paper's tables beside ours", columns, body if sets else [], note)


def figures(rows: Sequence[Row], drafters: Sequence[str]) -> list[Drawing]:
    """τ of every method, and the averages by λ."""
    found: list[Drawing] = []
    for kind in dict.fromkeys(str(row.extra["kind"]) for row in rows):
        own = where(rows, accounting=lambda a: a != WALL_CLOCK, domain=INTERLEAVED)
        main = details.shared_trees([row for row in own if row.extra["kind"] == kind])
        if not main:
            continue
        least = min(row.node_budget for row in main)
        for t in sorted({row.temperature for row in main}):
            here = where(main, node_budget=least, temperature=t)
            points = []
            for method in details.ordered(here, drafters):
                length = acceptance(where(here, method=method))
                if length is not None and not method.startswith("average-"):
                    points.append(Point(method, 0.0, length.estimate, length.low, length.high))
            single = details.best_of(here, [d for d in drafters if where(here, method=d)])
            title = f"{details.HEADS[kind]}: acceptance length, {least} nodes, T={t:g}"
            caption = "All test prompts interleaved, 95 % intervals; the dashed line is the best single drafter."
            mark = next((point for point in points if point.label == single), None)
            found.append(ranked(f"taps-{kind}-{t:g}", title, caption, points, "τ", mark))
        found += _averages(where(main, node_budget=least), kind)
    return found


def _averages(rows: Sequence[Row], kind: str) -> list[Drawing]:
    series = []
    for t in sorted({row.temperature for row in rows}):
        points = []
        for method in sorted({row.method for row in rows if row.method.startswith("average-")}):
            length = acceptance(where(rows, method=method, temperature=t))
            if length is not None:
                weight = float(method.removeprefix("average-"))
                points.append(Point(f"T={t:g}", weight, length.estimate, length.low, length.high))
        if len(points) > 1:
            series.append(points)
    title = f"{details.HEADS[kind]}: averages of two specialists"
    caption = "All test prompts interleaved; bars are 95 % intervals."
    return [lines(f"taps-{kind}-averages", title, caption, series, "λ of the first", "τ")] if series else []
