"""What explains the TAPS study's figures: upper bounds, calibration, worst prompts, who drafts, shapes, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from draftsmith.studies.composed import INTERLEAVED
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Table, acceptance, percent, relative, shown, where

PAPER_SHARES = {"gsm8k": "90.8 % math", "mt-bench": "81.2 % chat"}
HEADS = {"eagle3": "EAGLE-3", "eagle": "EAGLE-2", "hass": "HASS"}
BY_LABEL, PER_PROMPT, PER_ROUND = "oracle: domain known", "oracle: best of each prompt", "oracle: best of each round"
WORST = 0.1

Pick = Callable[[str, Mapping[str, tuple[int, int]]], str]
"""Of a prompt and each method's (committed, rounds), the method that is taken."""


def oracles(rows: Sequence[Row], domains: Sequence[str], drafters: Sequence[str], kind: str) -> Table:
    temperatures = sorted({row.temperature for row in rows})
    budgets = sorted({row.node_budget for row in rows})
    first = where(rows, node_budget=budgets[0])
    home = {row.benchmark: row.domain for row in rows if row.domain != INTERLEAVED}
    there = {row.method for row in rows}
    specialists = [d for d in domains if d in there]
    singles = [d for d in drafters if d in there]

    def at_home(prompt: str, counts: Mapping[str, tuple[int, int]]) -> str:
        return next(domain for benchmark, domain in home.items() if prompt.startswith(f"{benchmark}:"))

    def longest(prompt: str, counts: Mapping[str, tuple[int, int]]) -> str:
        return max(counts, key=lambda m: counts[m][0] / counts[m][1] if counts[m][1] else 0.0)

    if len(specialists) < 2:
        return Table("", [], [])
    bounds = {
        BY_LABEL: chosen(first, specialists, BY_LABEL, at_home),
        f"{PER_PROMPT}, specialists": chosen(first, specialists, PER_PROMPT, longest),
        f"{PER_PROMPT}, all drafters": chosen(first, singles, PER_PROMPT, longest),
        f"{PER_ROUND}, specialists": where(
            rows, method="merge-concat", domain=INTERLEAVED, node_budget=len(specialists) * budgets[0]
        ),
    }
    body = []
    for name, own in bounds.items():
        line = [name]
        for t in temperatures:
            mine = where(own, temperature=t)
            single = best_of(where(first, temperature=t), singles)
            beside = where(first, method=single, domain=INTERLEAVED, temperature=t)
            line += [shown(acceptance(mine)), percent(relative(mine, beside), less=1)]
        body.append(line)
    columns = ["bound"]
    for t in temperatures:
        columns += [f"τ, T={t:g}", "against the best single"]
    note = (
        f"What a route could come to at {budgets[0]} nodes if it knew: the prompt's domain, which drafter does best on "
        "the prompt, or in the round. The last is merge-concat with as many nodes for each specialist: its path is the "
        "longest of theirs."
    )
    return Table(f"{HEADS[kind]}: upper bounds", columns, body, note)


def calibration(rows: Sequence[Row], kind: str) -> Table:
    there = {row.method for row in rows}
    body = []
    for method in sorted(there):
        plain = method.removesuffix("-calibrated")
        if plain == method or plain not in there:
            continue
        for budget in sorted({row.node_budget for row in rows}):
            for t in sorted({row.temperature for row in rows}):
                same = {"domain": INTERLEAVED, "node_budget": budget, "temperature": t}
                own, other = where(rows, method=method, **same), where(rows, method=plain, **same)
                change = percent(relative(own, other), less=1)
                body.append([plain, str(budget), f"{t:g}", shown(acceptance(other)), shown(acceptance(own)), change])
    columns = ["composition", "nodes", "T", "τ without temperatures", "τ with", "change"]
    note = "Temperatures by drafter and depth, fitted on dev answers. Paired by seed and prompt."
    return Table(f"{HEADS[kind]}: calibration", columns, body, note)


def worst(rows: Sequence[Row], drafters: Sequence[str], kind: str) -> Table:
    temperatures = sorted({row.temperature for row in rows})
    columns = ["method"]
    for t in temperatures:
        columns += [f"worst tenth, T={t:g}", "worse than the best single", "worst prompt against it"]
    body = []
    for method in ordered(rows, drafters):
        line = [method]
        for t in temperatures:
            here = where(rows, domain=INTERLEAVED, temperature=t)
            single = best_of(here, [d for d in drafters if d in {row.method for row in here}])
            mine, beside = (_lengths(where(here, method=m)) for m in (method, single))
            if not mine:
                line += ["–", "–", "–"]
                continue
            lowest = sorted(mine.values())[: max(1, round(WORST * len(mine)))]
            line.append(f"{sum(lowest) / len(lowest):.2f}")
            ratios = {k: mine[k] / beside[k] for k in mine if k in beside}
            if method == single or not ratios:
                line += ["–", "–"]
                continue
            worst = min(ratios, key=lambda k: ratios[k])
            line.append(f"{sum(r < 1 for r in ratios.values()) / len(ratios):.0%}")
            line.append(f"{100 * (ratios[worst] - 1):+.0f} % ({worst[1]})")
        body.append(line)
    note = (
        "Per prompt: mean τ of the tenth that fares worst; share of prompts on which the best single drafter does "
        "better; the prompt that loses most."
    )
    return Table(f"{HEADS[kind]}: worst prompts, {nodes_of(rows)} nodes", columns, body, note)


def shares(rows: Sequence[Row], kind: str) -> Table:
    sets = sorted({(row.benchmark, row.temperature) for row in rows if row.domain != INTERLEAVED})
    body = []
    for method in ordered(rows):
        mine = where(rows, method=method)
        names = [key.removeprefix("rounds:") for key in mine[0].extra if key.startswith("rounds:")]
        for name in names:
            line = [method, name]
            for benchmark, t in sets:
                own = where(mine, benchmark=benchmark, temperature=t)
                line.append(" / ".join(f"{_mean(own, f'{what}:{name}'):.0%}" for what in ("rounds", "accepted")))
            body.append(line)
    columns = ["method", "drafter", *(f"{benchmark}, T={t:g}" for benchmark, t in sets)]
    paper = ", ".join(f"{name} {share}" for name, share in PAPER_SHARES.items())
    note = (
        "Rounds in which a drafter has a node in the tree / its part of the accepted tokens. Confidence routing in the "
        f"paper, a prompt at a time: {paper}."
    )
    return Table(f"{HEADS[kind]}: who drafts, {nodes_of(rows)} nodes", columns, body, note, left=2)


def depths(rows: Sequence[Row], kind: str) -> Table:
    sets = sorted({(row.benchmark, row.temperature) for row in rows if row.domain != INTERLEAVED})
    body = []
    for method in ordered(rows):
        line = [method]
        for benchmark, t in sets:
            own = where(rows, method=method, benchmark=benchmark, temperature=t)
            deepest = max((len(row.alpha_by_depth) for row in own), default=0)
            each = [[row.alpha_by_depth[d] for row in own if d < len(row.alpha_by_depth)] for d in range(deepest)]
            known = [[a for a in of_depth if a is not None] for of_depth in each]
            line.append(" ".join(f"{100 * sum(k) / len(k):.0f}" for k in known if k))
        body.append(line)
    columns = ["method", *(f"{benchmark}, T={t:g}" for benchmark, t in sets)]
    note = "Accepted of the rounds that held a node at this depth, in percent, from depth 1 on; mean over seeds."
    return Table(f"{HEADS[kind]}: acceptance by depth, {nodes_of(rows)} nodes", columns, body, note)


def shapes(rows: Sequence[Row], kind: str) -> Table:
    least = min(row.node_budget for row in rows)
    here = where(rows, node_budget=least, domain=INTERLEAVED)
    shapes = sorted({_shape(row) for row in here})
    temperatures = sorted({row.temperature for row in here})
    if len(shapes) < 2:
        return Table("", [], [])
    body = []
    for method in ordered(here):
        for t in temperatures:
            mine = where(here, method=method, temperature=t)
            found = [acceptance([row for row in mine if _shape(row) == shape]) for shape in shapes]
            if sum(f is not None for f in found) > 1:
                body.append([method, f"{t:g}", *("–" if f is None else f"{f.estimate:.3f}" for f in found)])
    columns = ["method", "T", *(f"{d} × {w}" for d, w in shapes)]
    return Table(f"{HEADS[kind]}: depth × width, {least} nodes", columns, body, left=2)


def speed(rows: Sequence[Row], drafters: Sequence[str], kind: str) -> Table:
    sets = sorted({(row.benchmark, row.temperature) for row in rows}, key=lambda s: (s[0] != INTERLEAVED, s))
    columns = ["method", "nodes", "ms a round: draft, verify, rest"]
    columns += [f"{benchmark}, T={t:g}" for benchmark, t in sets]
    body = []
    for method in ordered(rows, drafters):
        for nodes in sorted({row.node_budget for row in where(rows, method=method)}):
            mine = where(rows, method=method, node_budget=nodes)
            parts = where(mine, benchmark=INTERLEAVED) or mine
            split = ", ".join(f"{_mean(parts, part):.1f}" for part in ("draft_ms", "verify_ms", "rest_ms"))
            line = [method, str(nodes), split]
            for benchmark, t in sets:
                found = where(mine, benchmark=benchmark, temperature=t)
                line.append(_speedup(found[0]) if found else "–")
            body.append(line)
    note = (
        "Speed-up over plain decoding by the wall clock and (τ); all in one run, prompt by prompt in turn; the first "
        "seed's drafters."
    )
    return Table(f"{HEADS[kind]}: speed-up", columns, body, note)


def _speedup(row: Row) -> str:
    low, high = row.extra.get("speedup_low"), row.extra.get("speedup_high")
    ends = f" [{low:.2f}, {high:.2f}]" if isinstance(low, float) and isinstance(high, float) else ""
    return f"{row.speedup or 0:.2f}×{ends} ({row.acceptance_length or 0:.2f})"


def shared_trees(rows: Sequence[Row]) -> list[Row]:
    """The rows of the trees that all methods share."""
    return [row for row in rows if "sweep" not in row.extra]


def chosen(rows: Sequence[Row], methods: Sequence[str], name: str, pick: Pick) -> list[Row]:
    """Interleaved rows of a method that does not exist: each prompt's counts are those of the method that is picked."""
    found = []
    inter = where(rows, domain=INTERLEAVED, method=lambda m: m in methods)
    for example in where(inter, method=methods[0]):
        same = {"seed": example.seed, "temperature": example.temperature, "node_budget": example.node_budget}
        counts = {row.method: _counts(row) for row in where(inter, **same)}
        if set(counts) != set(methods):
            continue
        taken = [counts[pick(p, {m: counts[m][p] for m in methods})][p] for p in example.prompts]
        committed, rounds = (tuple(part[i] for part in taken) for i in (0, 1))
        length = sum(committed) / sum(rounds) if sum(rounds) else None
        changed = {"method": name, "committed": committed, "rounds": rounds, "acceptance_length": length}
        found.append(example.model_copy(update=changed))
    return found


def best_of(rows: Sequence[Row], methods: Sequence[str]) -> str | None:
    """The method of largest τ over all prompts interleaved; looked up on the test answers, so it flatters itself."""
    lengths = {m: acceptance(where(rows, domain=INTERLEAVED, method=m)) for m in methods}
    known = {m: found.estimate for m, found in lengths.items() if found is not None}
    return max(known, key=lambda m: known[m]) if known else None


def ordered(rows: Sequence[Row], drafters: Sequence[str] = ()) -> list[str]:
    """The methods that there are: drafters first, then in the order of their rows."""
    there = list(dict.fromkeys(row.method for row in rows))
    return [m for m in drafters if m in there] + [m for m in there if m not in drafters]


def _counts(row: Row) -> dict[str, tuple[int, int]]:
    return {p: (c, r) for p, c, r in zip(row.prompts, row.committed, row.rounds, strict=True)}


def _lengths(rows: Sequence[Row]) -> dict[tuple[int, str], float]:
    """τ of each seed's prompts."""
    return {
        (row.seed, prompt): committed / rounds
        for row in rows
        for prompt, (committed, rounds) in _counts(row).items()
        if rounds
    }


def _mean(rows: Sequence[Row], name: str) -> float:
    found = [float(row.extra[name]) for row in rows if name in row.extra]
    return sum(found) / len(found) if found else 0.0


def nodes_of(rows: Sequence[Row]) -> int:
    return rows[0].node_budget if rows else 0


def _shape(row: Row) -> tuple[int, int]:
    return int(row.extra["depth"]), int(row.extra["width"])
