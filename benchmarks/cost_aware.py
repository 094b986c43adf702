"""Does the budget that the stored costs choose keep up with the best fixed one, whatever is asked and how many at once?

    draftsmith profile --target smollm2 --drafters head=RUN --out profile.json
    python benchmarks/cost_aware.py --run RUN --profile profile.json

For each of {chat, math, code} (MT-Bench, GSM8K and HumanEval from DRAFTSMITH_DATA) and each batch size, all growths
answer the same prompts by turns: trees of a fixed number of nodes, and the cost-aware one, all to the same depth and
width. `against best` is the cost-aware growth's tokens per second over the best fixed budget's, with a 95 % interval
paired over prompts; its nodes and τ are means of a round. Growths never look at clocks, so these are the same in every
repetition.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.commands.stage import opened
from draftsmith.data.benchmarks import load_benchmark
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.stored import available
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.evaluation.statistics import speedup_interval
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError

AWARE = "cost-aware"
Rows = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write rows and `cost-aware.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run: its target and its drafter")
    parser.add_argument("--profile", type=Path, required=True, help="costs of this machine, by draftsmith profile")
    parser.add_argument("--sets", default="chat=mt-bench,math=gsm8k,code=humaneval", help="name=benchmark, by commas")
    parser.add_argument("--batches", default="1,4", help="prompts decoded together, by commas")
    parser.add_argument("--budgets", default="3,7,15,31", help="fixed numbers of nodes, by commas")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=12, help="of each set")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--set", action="append", default=[], help="a recipe's option, such as target.kernels=packed")
    parser.add_argument("--out", type=Path, default=Path("cost-aware"), help="folder of rows and cost-aware.json")
    given = parser.parse_args(arguments)
    run = opened(given.run, None, given.set)
    drafter = available(given.run, run.target).drafter
    budgets = [int(n) for n in given.budgets.split(",")]
    shape = {"depth": given.depth, "width": given.width}
    sets = {name: load_benchmark(place) for name, place in (one.split("=", 1) for one in given.sets.split(","))}
    found: list[dict[str, Any]] = []
    for batch in map(int, given.batches.split(",")):
        aware = {"kind": AWARE, "profile": given.profile, "sequences": batch, "node_budget": max(budgets)}
        growths = {str(n): GrowthOptions(node_budget=n, **shape) for n in budgets}
        growths[AWARE] = GrowthOptions(**aware, **shape)
        made: dict[str, Composition] = {name: Single(drafter, g.build()) for name, g in growths.items()}
        options = BenchOptions(prompts=given.prompts, max_new_tokens=given.tokens, batch=batch)
        out = given.out / f"batch-{batch}.jsonl"
        out.unlink(missing_ok=True)
        rows = benching.bench(run.target, made, sets, options, out)
        found += [{"set": name, "batch": batch, **compared(rows, name, list(growths))} for name in sets]
    show(found)
    facts = {
        "target": f"{run.target.spec.name} ({run.target.spec.dtype}, {run.target.kernels} kernels)",
        "profile": str(given.profile),
    }
    artefacts.write_json(given.out / "cost-aware.json", {"results": found, **facts, "provenance": provenance.collect()})
    console.say(f"numbers: {given.out / 'cost-aware.json'}")


def compared(rows: Rows, name: str, growths: Sequence[str]) -> dict[str, Any]:
    """One set: tokens per second, mean nodes and accepted tokens of a round of each growth, and cost-aware over the
    best fixed one."""
    own = {g: [row for row in rows if row["set"] == name and row["drafters"] == g] for g in growths}
    speeds = {}
    for growth, members in own.items():
        rounds = [r for row in members for r in row["generation"]["rounds"]]
        tokens, seconds = totals(members)
        speeds[growth] = {
            "tokens_per_second": sum(tokens) / sum(seconds),
            "nodes": sum(r["nodes"] for r in rounds) / len(rounds),
            "acceptance_length": sum(r["committed"] for r in rounds) / len(rounds),
        }
    best = max((g for g in growths if g != AWARE), key=lambda g: speeds[g]["tokens_per_second"])
    interval = speedup_interval(*totals(own[AWARE]), *totals(own[best]))
    against = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {"growths": speeds, "best": best, "against_best": against}


def totals(members: Rows) -> tuple[list[float], list[float]]:
    """Tokens and seconds of each answer."""
    generations = [row["generation"] for row in members]
    return [len(g["token_ids"]) for g in generations], [g["total_ms"] / 1e3 for g in generations]


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    growths = list(found[0]["growths"])
    rows = []
    for one in found:
        aware = one["growths"][AWARE]
        ratio = one["against_best"]
        low, high = (f"{ratio[end]:.2f}" if ratio[end] is not None else "–" for end in ("low", "high"))
        rows.append(
            [
                one["set"],
                str(one["batch"]),
                *(f"{one['growths'][g]['tokens_per_second']:.1f}" for g in growths),
                f"{aware['nodes']:.1f}",
                f"{aware['acceptance_length']:.2f}",
                f"{ratio['estimate']:.2f} ({low}–{high})",
            ]
        )
    columns = ["set", "batch", *growths, "its nodes", "its τ", "against best"]
    console.table("Tokens per second by nodes of a round", columns, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        console.error(str(problem))
        sys.exit(2)
