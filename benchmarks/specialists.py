"""What several specialists cost: drafting over a shared trunk, and rounds of a route, against one drafter's.

    python benchmarks/specialists.py --run RUN

RUN's drafter stands for every specialist: copies of it with memory of their own, and low-rank updates of it over one
trunk, too small to change a draft. So all decode the same rounds, and what differs in time is what putting drafters
together costs. Everybody answers the same prompts in one process, prompt by prompt in turn; ratios are paired by
prompt, with 95 % intervals. Drafting is `propose` and `observe`: growing trees, catching up and merging included.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith.commands.stage import opened
from draftsmith.data.benchmarks import load_benchmark
from draftsmith.decoding.building import Available, build
from draftsmith.decoding.composition import Composition, Hidden
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.stored import available
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.shared_trunk import adapted, updates
from draftsmith.evaluation import asking
from draftsmith.evaluation.statistics import Interval, hierarchical_bootstrap, ratio_of_ratios
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec

SMALL = 1e-6  # of a low-rank update: the drafts stay the trunk's
ONE = "one"
Spent = tuple[float, float, float]
"""Drafting and whole milliseconds, and rounds."""
ROUTES = {
    "route:entropy": "route:entropy(a,b,c)",
    "route:hedge": "route:hedge(a,b,c)",
    "route:hedge, every 4": "route:hedge(a,b,c,every=4)",
    "route:confidence": "route:confidence(a,b,c)",
    "merge:trie": "merge:trie(a,b,c)",
}
SHARED = {
    "shared trunk, route:confidence": "route:confidence(x,y,z)",
    "shared trunk, merge:trie": "merge:trie(x,y,z)",
}


@dataclass
class Timed:
    """A composition whose drafting is timed, the prompt's reading left out."""

    inner: Composition
    wait: Callable[[], None]
    spent: float = 0.0
    _started: bool = field(default=False, init=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.inner.names

    @property
    def wants(self) -> FeatureSpec:
        return self.inner.wants

    @property
    def budget(self) -> int:
        return self.inner.budget

    def start(self, batch: int, capacity: int) -> Any:
        self._started = False
        return self.inner.start(batch, capacity)

    def observe(self, state: Any, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        begin = self._now()
        self.inner.observe(state, tokens, hidden, lengths)
        self.spent += (self._now() - begin) * self._started
        self._started = True

    def propose(self, state: Any, limits: Limits) -> DraftTree:
        begin = self._now()
        tree = self.inner.propose(state, limits)
        self.spent += self._now() - begin
        return tree

    def _now(self) -> float:
        self.wait()
        return time.perf_counter() * 1e3


def members(run: Path, target: HFTarget) -> tuple[dict[str, Available], Any]:
    """Copies of the run's drafter as `a`, `b`, `c`, low-rank updates of it as `x`, `y`, `z`; and its growth."""
    known = available(run, target)
    head = known.drafter
    if not isinstance(head, Head):
        raise UserError(f"{run} holds no head: low-rank updates are made of heads")
    kept = {id(head.embedding): head.embedding}
    drafters: dict[str, Drafter] = {name: copy.deepcopy(head, dict(kept)) for name in "abc"}
    for number, name in enumerate("xyz"):
        drafters[name] = low_rank = adapted(head, seed=number)
        for layer in updates(low_rank).values():
            torch.nn.init.constant_(layer.up, SMALL)
        low_rank.eval().requires_grad_(False)
    return {name: Available(drafter, known.growth) for name, drafter in drafters.items()}, known.growth


def measured(
    target: HFTarget, compositions: Mapping[str, Timed], prompts: Sequence[Sequence[int]], tokens: int, repeats: int
) -> dict[str, list[Spent]]:
    """Of each composition and prompt: drafting and whole milliseconds (the least of some repeats), and rounds."""
    found: dict[str, list[Spent]] = {name: [] for name in compositions}
    names = list(compositions)
    for number, prompt in enumerate([prompts[0], *prompts]):
        each: dict[str, list[Spent]] = {name: [] for name in names}
        for turn in range(repeats):
            first = (number + turn) % len(names)
            for name in names[first:] + names[:first]:
                timed = compositions[name]
                timed.spent = 0.0
                answer = Engine(target, timed).generate([prompt], None, tokens)[0]
                each[name].append((timed.spent, answer.total_ms - answer.prefill_ms, float(len(answer.rounds))))
        if number:  # the first prompt once more: it warms up
            for name, times in each.items():
                found[name].append((min(t[0] for t in times), min(t[1] for t in times), times[0][2]))
    return found


def against(own: Sequence[Spent], one: Sequence[Spent], part: int) -> Interval:
    """Milliseconds a round ÷ those of the one drafter, paired by prompt; `part` 0: drafting, 1: all."""
    columns = np.asarray([[[a[part], a[2], b[part], b[2]] for a, b in zip(own, one, strict=True)]], np.float64)
    found = hierarchical_bootstrap(columns, lambda sums: np.log(ratio_of_ratios(sums)))
    ends = (None if end is None else float(np.exp(end)) for end in (found.low, found.high))
    return Interval(float(np.exp(found.estimate)), *ends)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write `specialists.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run: its target, its drafter, its tree")
    parser.add_argument("--benchmark", default="gsm8k", help="a benchmark or a jsonl file")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("specialists.json"))
    given = parser.parse_args(arguments)
    target = opened(given.run, None, []).target
    drafters, growth = members(given.run, target)
    wait = torch.cuda.synchronize if target.device.type == "cuda" else lambda: None
    lines = {ONE: "a", **ROUTES, "shared trunk, one": "x", **SHARED}
    compositions = {name: Timed(build(line, drafters, growth), wait) for name, line in lines.items()}
    asked = load_benchmark(given.benchmark)[: given.prompts]
    units = asking.plan(target, {given.benchmark: asked}, given.prompts, 1, (0.0,), 1, 0, [])
    prompts = [unit.prompts(target, {})[0] for unit in units if not unit.asked[0].id.endswith("@2")]
    found = measured(target, compositions, prompts, given.tokens, given.repeats)
    rows, told = [], {}
    for name, own in found.items():
        drafting, whole = (against(own, found[ONE], part) for part in (0, 1))
        rounds = sum(o[2] for o in own)
        each = [sum(o[part] for o in own) / rounds for part in (0, 1)]
        told[name] = {"rounds": rounds, "draft_ms": each[0], "round_ms": each[1], "drafting": vars_of(drafting)}
        told[name]["round"] = vars_of(whole)
        rows.append([name, f"{rounds:.0f}", f"{each[0]:.2f}", f"{each[1]:.2f}", text(drafting), text(whole)])
    columns = ["who", "rounds", "drafting ms", "round ms", "drafting ÷ one's", "round ÷ one's"]
    console.table(f"{target.spec.name}, {len(prompts)} prompts of {given.benchmark}", columns, rows)
    artefacts.write_json(given.out, {"results": told, "provenance": provenance.collect()})


def text(found: Interval) -> str:
    """`1.08× [1.06, 1.10]`."""
    ends = f" [{found.low:.2f}, {found.high:.2f}]" if found.low is not None and found.high is not None else ""
    return f"{found.estimate:.2f}×{ends}"


def vars_of(found: Interval) -> dict[str, float | None]:
    """An interval as JSON."""
    return {"estimate": found.estimate, "low": found.low, "high": found.high}


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        console.error(str(problem))
        sys.exit(2)
