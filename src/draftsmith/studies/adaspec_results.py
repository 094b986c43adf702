"""Tables and figures of the AdaSPEC study, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from draftsmith.evaluation.statistics import Interval, hierarchical_bootstrap, ratio
from draftsmith.studies.drafts import METHODS, PLAIN_LOSS, canonical
from draftsmith.studies.figures import Drawing, Point, lines, scatter
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Key, Table, acceptance, paired, percent, relative, shown, where

# Table 1 of the paper: α in percent, DistillSpec → AdaSPEC, by target and draft, 3 epochs each; one seed.
PAPER: Mapping[str, tuple[str, tuple[float, float], tuple[float, float]]] = {
    "math": ("GSM8K", (57.58, 62.63), (79.49, 82.79)),
    "chat": ("Alpaca", (44.34, 47.25), (56.48, 58.80)),
    "code": ("MBPP", (46.88, 47.73), (87.36, 88.76)),
    "summarisation": ("CNN/DM", (73.05, 74.22), (79.33, 80.63)),
}
# Table 2 (Pythia, 3 epochs): the 40 % of largest and of smallest ΔL.
PAPER_LEAST: Mapping[str, Mapping[str, float]] = {
    "math": {"adaspec": 63.22, "adaspec-least": 49.03},
    "code": {"adaspec": 48.22, "adaspec-least": 39.75},
}
# Table 4 (Pythia, GSM8K): the divergence that the draft is trained with.
PAPER_LOSSES: Mapping[str, float] = {"forward-kl": 63.22, "reverse-kl": 30.05, "tv": 9.09}
PAPER_K = 0.4
ACCOUNTINGS = ("equal-epochs", "equal-tokens", "equal-cost")
PAPER_NOTE = (
    "The paper's: α in percent, Pythia-31M for Pythia-1.4B / CodeGen-350M for Phi-2, three epochs, one seed, greedy."
)


def judged(rows: Sequence[Row]) -> dict[int, dict[Key, tuple[int, int]]]:
    """(accepted, accepted + rejected) drafted tokens of every test answer by seed."""
    found: dict[int, dict[Key, tuple[int, int]]] = {}
    for row in rows:
        of_seed = found.setdefault(row.seed, {})
        for name, committed, rounds, rejected in zip(row.prompts, row.committed, row.rounds, row.rejected, strict=True):
            of_seed[row.benchmark, name] = (committed - rounds, committed - rounds + rejected)
    return found


def alpha(rows: Sequence[Row]) -> Interval | None:
    """AdaSPEC's α (eq. 3) over all seeds and answers of some rows, with its interval."""
    cells = paired([judged(rows)])
    return None if cells is None else hierarchical_bootstrap(cells, ratio)


def alpha_gain(rows: Sequence[Row], reference: Sequence[Row]) -> Interval | None:
    """α of some rows less that of others, paired by seed and answer."""
    cells = paired([judged(rows), judged(reference)])
    if cells is None:
        return None
    return hierarchical_bootstrap(cells, lambda sums: ratio(sums[..., :2]) - ratio(sums[..., 2:]))


def at(rows: Sequence[Row], accounting: str) -> list[Row]:
    """The rows that stand for an accounting; some of them were trained under another's name (`canonical`)."""
    return [r for r in rows if r.accounting == canonical(r.method, accounting, str(r.extra["loss"]))]


def drafts_of(rows: Sequence[Row]) -> list[Row]:
    """Standalone drafts of the grid's main part: the paper's k, forward KL where a method has no loss of its own."""
    here = [r for r in rows if r.extra["drafter"] == "standalone"]
    here = [r for r in here if METHODS[r.method].loss or r.extra["loss"] == PLAIN_LOSS]
    shares = {r.keep for r in here if METHODS[r.method].keeps_share}
    k = PAPER_K if PAPER_K in shares else min(shares, default=1.0)
    return [r for r in here if not METHODS[r.method].keeps_share or r.keep == k]


def ordered(rows: Sequence[Row]) -> list[str]:
    """The methods that there are."""
    there = {row.method for row in rows}
    return [method for method in METHODS if method in there]


def tables(rows: Sequence[Row]) -> list[Table]:
    """By accounting: α by domain, τ by chain length, what it cost; then the ablations."""
    if not rows:
        return []
    first = [r for r in rows if r.node_budget == rows[0].node_budget]
    main, found = drafts_of(first), []
    for accounting in ACCOUNTINGS:
        if any(r.accounting == accounting for r in main):
            here = at(main, accounting)
            found += [_by_domain(here, accounting, t) for t in _temperatures(here)]
            if accounting == "equal-cost":
                found.append(_verdict(here))
            found.append(_by_length(at(drafts_of(rows), accounting), accounting))
    found.append(_cost(main))
    if any(r.speedup is not None for r in first):
        found.append(_speed(first))
    return found + _ablations(first)


def _temperatures(rows: Sequence[Row]) -> list[float]:
    return sorted({row.temperature for row in rows})


def _domains(rows: Sequence[Row]) -> list[str]:
    there = {row.domain for row in rows}
    return [d for d in PAPER if d in there] + sorted(there - set(PAPER))


def _named(accounting: str) -> str:
    return accounting.replace("-", " ")


def _by_domain(rows: Sequence[Row], accounting: str, temperature: float) -> Table:
    here = where(rows, temperature=temperature)
    domains = _domains(here)
    columns = ["method", "k", "seeds"]
    for domain in domains:
        columns += [f"α, {domain}", "against DistillSpec", "paper"]
    columns += ["τ, all", "against DistillSpec"]
    plain = where(here, method="distillspec")
    body = []
    for method in ordered(here):
        mine = where(here, method=method)
        line = [method, f"{mine[0].keep:g}" if METHODS[method].keeps_share else "–", str(len({r.seed for r in mine}))]
        for domain in domains:
            own, other = where(mine, domain=domain), where(plain, domain=domain)
            line += [percent(alpha(own)), "–" if method == "distillspec" else _points(alpha_gain(own, other))]
            line.append(_paper(domain, method) if accounting != "equal-cost" and temperature == 0 else "–")
        line += [shown(acceptance(mine)), "–" if method == "distillspec" else percent(relative(mine, plain), less=1)]
        body.append(line)
    note = (
        f"Chains of {here[0].node_budget} tokens on stored answers; α = accepted ÷ (accepted + rejected), differences "
        f"in points, paired by seed and answer, with 95 % intervals. {PAPER_NOTE}"
    )
    return Table(f"Acceptance at {_named(accounting)}, T={temperature:g}", columns, body, note)


def _paper(domain: str, method: str) -> str:
    place = {"distillspec": 0, "adaspec": 1}.get(method)
    if domain not in PAPER or place is None:
        return "–"
    task, *pairs = PAPER[domain]
    return f"{' / '.join(f'{pair[place]:.2f}' for pair in pairs)} ({task})"


def _points(value: Interval | None) -> str:
    """A difference of shares in points: `"+1.2 [+0.3, +2.1]"`."""
    if value is None:
        return "–"
    ends = "" if value.low is None or value.high is None else f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"{100 * value.estimate:+.1f}{ends}"


def _verdict(rows: Sequence[Row]) -> Table:
    """In how many domains each method is above DistillSpec, its interval excluding zero."""
    temperatures = _temperatures(rows)
    body = []
    for method in ordered(rows):
        if method == "distillspec":
            continue
        line = [method]
        for t in temperatures:
            signs: dict[str, list[str]] = {"above": [], "below": [], "undecided": []}
            for domain in _domains(rows):
                mine, plain = (where(rows, method=m, domain=domain, temperature=t) for m in (method, "distillspec"))
                found = alpha_gain(mine, plain)
                if found is not None and found.low is not None and found.high is not None:
                    sign = "above" if found.low > 0 else "below" if found.high < 0 else "undecided"
                    signs[sign].append(domain)
            line += [" ".join([str(len(names)), *names]) for names in signs.values()]
        body.append(line)
    columns = ["method", *(f"{sign}, T={t:g}" for t in temperatures for sign in ("above", "below", "undecided"))]
    note = "α against DistillSpec's, in how many domains with an interval that excludes zero."
    return Table("Better at equal cost?", columns, body, note)


def _by_length(rows: Sequence[Row], accounting: str) -> Table:
    lengths, temperatures = sorted({row.node_budget for row in rows}), _temperatures(rows)
    columns = ["method", *(f"τ, {n} tokens, T={t:g}" for t in temperatures for n in lengths)]
    columns += [f"overlap, T={t:g}" for t in temperatures if t > 0]
    body = []
    for method in ordered(rows):
        line = [method]
        for t in temperatures:
            for n in lengths:
                mine = where(rows, method=method, temperature=t, node_budget=n)
                rounds = sum(sum(r.rounds) for r in mine)
                line.append(f"{sum(sum(r.committed) for r in mine) / rounds:.3f}" if rounds else "–")
        for t in (t for t in temperatures if t > 0):
            mine = where(rows, method=method, temperature=t, node_budget=lengths[0])
            weights = [float(r.extra.get("overlap_tokens", 0)) for r in mine]
            total = sum(w * float(r.extra.get("overlap", 0)) for w, r in zip(weights, mine, strict=True))
            line.append(f"{total / sum(weights):.3f}" if sum(weights) else "–")
        body.append(line)
    note = (
        "All domains together. Overlap Σ min(p, q) over the answers' tokens is what sampled chains (min(1, p/q)) would "
        "be accepted with."
    )
    return Table(f"Chains of several lengths at {_named(accounting)}", columns, body, note)


def spent(rows: Sequence[Row], name: str) -> float:
    """A number of `extra` (or of the row), summed over domains, mean over seeds; a cell counts once."""
    cells = {(r.seed, r.domain): float(r.extra[name] if name in r.extra else getattr(r, name)) for r in rows}
    return sum(cells.values()) / len({seed for seed, _ in cells}) if cells else 0.0


def _cost(rows: Sequence[Row]) -> Table:
    plain = where(rows, method="distillspec", accounting="equal-epochs")
    columns = ["method", "accounting", "steps", "draft: passes", "tokens", "reference: passes", "tokens"]
    columns += ["reference's losses: passes", "tokens", "draft wrote", "target read: texts", "tokens"]
    columns += ["training ÷ DistillSpec's", "with the target's", "seconds"]
    names = ["training_steps", "draft_passes", "draft_tokens", "reference_passes", "reference_tokens", "judged_passes"]
    names += ["judged_tokens", "written_tokens", "target_texts", "target_tokens"]
    body = []
    for method in ordered(rows):
        for accounting in ACCOUNTINGS:
            mine = where(rows, method=method, accounting=accounting)
            if not mine:
                continue
            line = [method, _named(accounting), *(f"{spent(mine, name):,.0f}" for name in names)]
            for name in ("training_work", "work"):
                whole = spent(plain, name)
                line.append(f"{spent(mine, name) / whole:.2f}×" if whole else "–")
            body.append([*line, f"{spent(mine, 'training_seconds'):.0f}"])
    note = (
        "All domains together, mean over seeds. Ratios are of multiply-adds with weights: the target reads its answers "
        "once for every method; the paper charges neither its reference nor its second look at the samples. Seconds: "
        "wall clock of all trainings on a shared machine."
    )
    return Table("What training cost", columns, body, note, left=2)


def _speed(rows: Sequence[Row]) -> Table:
    timed = [row for row in rows if row.speedup is not None]
    sets = sorted({(row.benchmark, row.temperature) for row in timed})
    body = []
    for method in ordered(timed):
        for accounting in ACCOUNTINGS:
            mine = where(timed, method=method, accounting=accounting)
            if mine:
                line = [method, _named(accounting)]
                for name, t in sets:
                    found = [r.speedup for r in where(mine, benchmark=name, temperature=t) if r.speedup is not None]
                    line.append(f"{found[0]:.2f}×" if found else "–")
                body.append(line)
    note = "Speed-up over plain decoding by the wall clock, one seed, prompts interleaved. The paper's: not comparable."
    return Table("Speed-up", ["method", "accounting", *(f"{name}, T={t:g}" for name, t in sets)], body, note, left=2)


def _ablations(rows: Sequence[Row]) -> list[Table]:
    rows = where(rows, accounting="equal-epochs", temperature=min(_temperatures(rows)))
    drafts = [r for r in rows if r.extra["drafter"] == "standalone"]
    plain = where(drafts, method="distillspec", extra=_with(loss=PLAIN_LOSS))
    found = []
    by_share = where(drafts, method="adaspec", extra=_with(loss=PLAIN_LOSS))
    shares = sorted({r.keep for r in by_share})
    if len(shares) > 1:
        groups = [("DistillSpec", plain), *((f"k = {k:g}", where(by_share, keep=k)) for k in shares)]
        found.append(_compared("The share k that is kept", groups, plain, lambda *_: "–"))
    least = where(drafts, method="adaspec-least")
    if least:
        k = least[0].keep
        top = where(by_share, keep=k)
        groups = [("DistillSpec", plain), ("adaspec", top), ("adaspec-least", least)]
        title = f"The {k:.0%} of largest and of smallest ΔL"
        found.append(_compared(title, groups, plain, lambda d, label: _number(PAPER_LEAST.get(d, {}).get(label))))
    names = sorted({str(r.extra["loss"]) for r in drafts if not METHODS[r.method].loss}, key=lambda n: n != PLAIN_LOSS)
    if len(names) > 1:
        groups = []
        for method in ("distillspec", "adaspec"):
            mine = [r for r in drafts if r.method == method and r.keep in (1.0, *_paper_share(by_share))]
            groups += [(f"{method}, {name}", where(mine, extra=_with(loss=name))) for name in names]

        def paper(domain: str, label: str) -> str:
            method, _, name = label.partition(", ")
            return _number(PAPER_LOSSES.get(name)) if (domain, method) == ("math", "adaspec") else "–"

        found.append(_compared("The divergence that is trained", groups, plain, paper))
    trained = [r for r in rows if r.extra["drafter"] == "eagle3"]
    if trained:
        groups = [(method, where(trained, method=method)) for method in ordered(trained)]
        head = where(trained, method="distillspec")
        note = "The paper's (table 6): accuracy in training 75.3 → 76.3 %, tokens per second +7.45 % (Vicuna-7B)."
        found.append(_compared("EAGLE-3 heads", groups, head, lambda *_: "–", note))
    return found


def _with(**wanted: object) -> Callable[[Mapping[str, object]], bool]:
    return lambda extra: all(extra.get(name) == value for name, value in wanted.items())


def _paper_share(rows: Sequence[Row]) -> list[float]:
    shares = {r.keep for r in rows}
    return [PAPER_K] if PAPER_K in shares else sorted(shares)[:1]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _compared(
    title: str,
    groups: Sequence[tuple[str, Sequence[Row]]],
    plain: Sequence[Row],
    paper: Callable[[str, str], str],
    note: str = PAPER_NOTE,
) -> Table:
    """α by domain of groups of rows, against DistillSpec at equal epochs."""
    domains = _domains([r for _, rows in groups for r in rows])
    columns = ["", "seeds"]
    for domain in domains:
        columns += [f"α, {domain}", "against DistillSpec", "paper"]
    body = []
    for label, rows in groups:
        if not rows:
            continue
        line = [label, str(len({r.seed for r in rows}))]
        for domain in domains:
            own, other = where(rows, domain=domain), where(plain, domain=domain)
            same = not own or own == other
            line += [percent(alpha(own)), "–" if same else _points(alpha_gain(own, other)), paper(domain, label)]
        body.append(line)
    first = next(r for _, rows in groups for r in rows)
    return Table(f"{title} (equal epochs, T={first.temperature:g})", columns, body, note)


def figures(rows: Sequence[Row]) -> list[Drawing]:
    """α against what training cost, and against k where there are several."""
    found: list[Drawing] = []
    first = [r for r in rows if r.node_budget == rows[0].node_budget] if rows else []
    main = drafts_of(first)
    for t in _temperatures(main):
        here = where(main, temperature=t)
        whole = spent(where(here, method="distillspec", accounting="equal-epochs"), "training_work")
        points = []
        for method in ordered(here):
            for accounting in ACCOUNTINGS:
                mine = where(here, method=method, accounting=accounting)
                value = alpha(mine)
                if value is not None and whole:
                    cost = spent(mine, "training_work") / whole
                    points.append(Point(f"{method}, {_named(accounting)}", cost, *_ends(value)))
        if points:
            title = f"Acceptance against the cost of training, T={t:g}"
            caption = "Up and left is better; reference and its losses are charged. Bars are 95 % intervals."
            found.append(scatter(f"cost-{t:g}", title, caption, points, "multiply-adds ÷ DistillSpec's", "α"))
    sweep = [r for r in where(first, method="adaspec", accounting="equal-epochs") if r.extra["loss"] == PLAIN_LOSS]
    sweep = [r for r in sweep if r.extra["drafter"] == "standalone" and r.temperature == min(_temperatures(first))]
    if len({r.keep for r in sweep}) > 1:
        series = []
        for domain in _domains(sweep):
            mine = where(sweep, domain=domain)
            known = [(k, alpha(where(mine, keep=k))) for k in sorted({r.keep for r in mine})]
            series.append([Point(domain, k, *_ends(value)) for k, value in known if value is not None])
        caption = "Equal epochs; bars are 95 % intervals over seeds and answers."
        found.append(lines("share", "Acceptance against the share kept", caption, series, "k", "α"))
    return found


def _ends(value: Interval) -> tuple[float, float | None, float | None]:
    return value.estimate, value.low, value.high
