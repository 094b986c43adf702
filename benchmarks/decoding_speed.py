"""Who answers faster: plain decoding, transformers and its own speculative decoding, and draftsmith with drafters.

    python benchmarks/decoding_speed.py --run RUN --assistant STANDALONE --compose chain=head@chain:4

Everybody answers the same GSM8K test problems (DRAFTSMITH_DATA) in one process, prompt by prompt in alternating order,
with one model object, greedily. Speed-ups are over draftsmith's plain decoding, with 95 % intervals paired over
prompts. The last columns say where a round's milliseconds go: the drafter's passes, the target's, the cache's commit,
and the rest (trees, verdicts, Python); `besides` is what is neither of the two models', as a share of the round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from draftsmith.commands.bench import composed, peers
from draftsmith.commands.stage import opened
from draftsmith.data.benchmarks import load_benchmark
from draftsmith.decoding.composition import Composition, Single
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.modes import Decoded, EngineMode, Mode
from draftsmith.evaluation.summary import Result, interval_text, lossless_text
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling

PARTS = ("draft", "verify", "commit")


class Watch:
    """Milliseconds spent inside some methods, by what they are for; while `on` is None nothing is counted."""

    def __init__(self, device: torch.device) -> None:
        self.on: Counter[str] | None = None
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def over(self, holder: Any, method: str, part: str) -> None:
        """Time a method of an object from now on."""
        inner = getattr(holder, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.on is None:
                return inner(*args, **kwargs)
            self._wait()
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self._wait()
                self.on[part] += (time.perf_counter() - started) * 1e3

        object.__setattr__(holder, method, timed)


class WatchedMode(EngineMode):
    """draftsmith's engine with a watch over its two models; the prefill counts as neither's."""

    def __init__(self, name: str, target: HFTarget, composition: Composition, watch: Watch) -> None:
        super().__init__(name, target, composition)
        self.spent: Counter[str] = Counter()
        self.rounds = 0
        self.total_ms = 0.0
        self._watch = watch

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        """As `EngineMode.decode`."""
        # The prompt's own passes are `prefill` and the first `observe` of a drafter: that one is taken off below.
        self._watch.on = Counter()
        found = super().decode(prompts, requests, sampling, max_new_tokens)
        spent, self._watch.on = self._watch.on, None
        spent["draft"] -= spent["first"]
        self.spent += Counter({part: spent[part] for part in PARTS})
        self.rounds += sum(len(one.generation.rounds) for one in found)
        self.total_ms += sum(one.generation.total_ms - one.generation.prefill_ms for one in found)
        return found

    def split(self) -> dict[str, float]:
        """Milliseconds of a round: draft, verify, commit, rest, and `besides`, the share of the last two."""
        parts = {part: self.spent[part] / self.rounds for part in PARTS}
        whole = self.total_ms / self.rounds
        rest = whole - sum(parts.values())
        return {**parts, "rest": rest, "besides": (parts["commit"] + rest) / whole}


def watched(target: HFTarget, compositions: dict[str, Composition]) -> list[WatchedMode]:
    """Each composition as a mode whose time is told apart; only single drafters can be watched."""
    watch = Watch(target.device)
    watch.over(target, "verify", "verify")
    watch.over(target, "commit", "commit")
    seen: set[int] = set()
    modes = []
    for name, composition in compositions.items():
        if isinstance(composition, Single) and id(composition.drafter) not in seen:
            seen.add(id(composition.drafter))
            watch.over(composition.drafter, "expand", "draft")
            _watch_observe(watch, composition.drafter)
        modes.append(WatchedMode(name, target, composition, watch))
    return modes


def _watch_observe(watch: Watch, drafter: Any) -> None:
    """Time `observe`, and the first one of an answer, which reads the prompt, apart as well."""
    watch.over(drafter, "observe", "draft")
    timed = drafter.observe

    def observe(*args: Any, **kwargs: Any) -> Any:
        before = watch.on["draft"] if watch.on is not None else 0.0
        found = timed(*args, **kwargs)
        if watch.on is not None and "first" not in watch.on:
            watch.on["first"] = watch.on["draft"] - before  # type: ignore[assignment]
        return found

    object.__setattr__(drafter, "observe", observe)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write rows and `speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run: its target, its drafter (`head`), its tree")
    parser.add_argument("--drafter", action="append", default=[], help="name=path of another drafter (several times)")
    parser.add_argument("--compose", action="append", default=[], help="name=specification (several times)")
    parser.add_argument("--assistant", help="a standalone draft for transformers' assisted generation")
    parser.add_argument("--assistant-tokens", default="2,4", help="its settings beside transformers' own heuristic")
    parser.add_argument("--lookup-tokens", default="3,10", help="settings of transformers' prompt lookup")
    parser.add_argument("--benchmark", default="gsm8k", help="a benchmark or a jsonl file")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most")
    parser.add_argument("--set", action="append", default=[], help="a recipe's option, such as target.kernels=packed")
    parser.add_argument("--out", type=Path, default=Path("decoding-speed"), help="folder of rows and speed.json")
    given = parser.parse_args(arguments)
    run = opened(given.run, None, given.set)
    target = run.target
    drafters = {"head": str(given.run), **dict(one.split("=", 1) for one in given.drafter)}
    compositions = composed(target, drafters, given.compose)
    baselines = ["prompt-lookup", "transformers"]
    baselines += [f"transformers-prompt-lookup:{n}" for n in given.lookup_tokens.split(",")]
    if given.assistant:
        settings = ["assisted", *(f"assisted:{n}" for n in given.assistant_tokens.split(","))]
        baselines += [f"{setting}={given.assistant}" for setting in settings]
    theirs = peers(target, baselines, None, compositions)
    ours = watched(target, compositions)
    modes: list[Mode] = [*theirs, *ours]
    for mode in theirs:
        mode.against = PLAIN  # type: ignore[misc]
    options = BenchOptions(prompts=given.prompts, max_new_tokens=given.tokens)
    (given.out / "speed.jsonl").unlink(missing_ok=True)  # a watch can't go on where another stopped
    sets = {given.benchmark: load_benchmark(given.benchmark)}
    rows = benching.bench(target, {}, sets, options, given.out / "speed.jsonl", peers=modes)
    results = sorted(benching.results(rows), key=lambda result: result.tokens_per_second)
    splits = {mode.name: mode.split() for mode in ours}
    show(results, splits)
    found = {
        "results": [{**r.model_dump(exclude_none=True), "split": splits.get(r.drafters)} for r in results],
        "target": f"{target.spec.name} ({target.spec.dtype}, {target.kernels} kernels)",
        "prompts": f"{given.prompts} of {given.benchmark}, {given.tokens} new tokens at most",
        "provenance": provenance.collect(),
    }
    artefacts.write_json(given.out / "speed.json", found)
    console.say(f"numbers: {given.out / 'speed.json'}")


def show(results: Sequence[Result], splits: dict[str, dict[str, float]]) -> None:
    """The table."""
    plain = results[0].plain_tokens_per_second
    rows = [["plain", f"{plain:.1f}", "1.00×", "–", "1.00", "1.00", *["–"] * 5, "–"]]
    for r in results:
        split = splits.get(r.drafters)
        parts = [f"{split[part]:.1f}" for part in (*PARTS, "rest")] if split else ["–"] * 4
        rows.append(
            [
                r.drafters,
                f"{r.tokens_per_second:.1f}",
                f"{r.speedup.estimate:.2f}×",
                interval_text(r.speedup),
                f"{r.acceptance_length:.2f}",
                f"{r.round_cost:.2f}",
                *parts,
                f"{split['besides']:.0%}" if split else "–",
                lossless_text(r.lossless),
            ]
        )
    columns = ["who", "tokens/s", "speed-up", "95 %", "τ", "round cost", *PARTS, "rest", "besides", "equal"]
    console.table("One run, prompt by prompt by turns; milliseconds of a round", columns, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        console.error(str(problem))
        sys.exit(2)
