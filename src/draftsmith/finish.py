"""What people look at and hand over once a run's stages are done: numbers, page, checkpoint folders."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.data.features import FeatureStore
from draftsmith.decoding import profile
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.evaluation.report.report import write_report
from draftsmith.evaluation.summary import Result, StageTime, Summary, read_summary, result_table, write_summary
from draftsmith.export import hand_over
from draftsmith.export.adapter import exportable, golden, serving, target_card
from draftsmith.export.chains import Chain, best, chains
from draftsmith.export.checkpoint import Drafter, Exported, Extras, HeadCheckpoint
from draftsmith.export.push import check_id, push
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import flatness_from_log_norm
from draftsmith.stages import chosen_growth, dev_by_set, read_selection, training_source
from draftsmith.target.detokenise import token_texts
from draftsmith.training.algorithms import TITLES

if TYPE_CHECKING:
    from draftsmith.pipeline import Run

NAME = "report and export"
SUMMARY, REPORT, MARK = "summary.json", "report.html", "finished.json"


def finish(run: Run) -> None:
    """Write `summary.json`, the exported checkpoint and `report.html`, if they are not there for this very bench."""
    mark = {"bench": artefacts.checksum(run.path("bench")), "export": list(run.recipe.export.to)}
    if _finished(run, mark):
        console.say(f"{NAME}: done before")
        summary = read_summary(run.folder / SUMMARY)
    else:
        console.heading(f"{NAME}: what to look at, and what to serve")
        started = time.perf_counter()
        summarise(run)
        export(run, run.recipe.export.to)
        report(run)
        run.spent(NAME, time.perf_counter() - started, anew=True)
        summary = summarise(run)
        artefacts.write_json(run.folder / MARK, mark)
    columns, rows = result_table(summary.results)
    console.table("Plain against speculative decoding, same engine, test prompts", columns, rows)


def _finished(run: Run, mark: object) -> bool:
    exports = [run.folder / "export" / server / artefacts.MANIFEST for server in run.recipe.export.to]
    if not all(path.is_file() for path in (run.folder / SUMMARY, run.folder / REPORT, *exports)):
        return False
    try:
        return bool(artefacts.read_json(run.folder / MARK) == mark)
    except UserError:
        return False


def summarise(run: Run) -> Summary:
    """`summary.json` from the bench's results and the stages' times (docs/summary.md).

    Raises:
        UserError: the bench is missing or damaged.
    """
    artefacts.opened(run.path("bench"), "bench")
    results = [Result.model_validate(row) for row in artefacts.read_json(run.path("bench") / "results.json")]
    times = [StageTime(name=name, seconds=seconds) for name, seconds in run.seconds().items()]
    summary = Summary(schema=1, results=results, stages=times)
    write_summary(run.folder / SUMMARY, summary)
    return summary


def facts(run: Run, public: bool = False) -> dict[str, object]:
    """What the report and the model card say of the run; `public`: a data file by its name alone."""
    o = run.recipe
    selection = read_selection(run)
    training = artefacts.read_json(run.path("train") / "training.json")
    results = artefacts.read_json(run.path("bench") / "results.json")
    asked = o.data.path or f"made prompts ({', '.join(o.data.sets)})"
    if public and o.data.path and Path(o.data.path).exists():
        asked = Path(o.data.path).name
    answers = "the file's own answers" if o.data.keep_answers else "answers by the target"
    made = "apache-2.0 (draftsmith's own prompts); answers by the target" if not o.data.path else None
    return {
        "licence": o.export.licence,
        "data_licence": o.export.data_licence or made,
        "data": f"{asked}; {answers}; {len(selection.kept)} samples kept by {o.select.method}, "
        f"{selection.tokens_kept} answer tokens",
        "training": f"{TITLES[o.drafter.kind]}, {o.drafter.draft_vocab_size} draft tokens, {training['steps']} steps, "
        f"best checkpoint at {training['best_step']}",
        "training_cost": {
            name: f"{seconds:.0f} s" for name, seconds in run.seconds().items() if name not in ("bench", NAME)
        },
        "acceptance": [
            {
                "set": row["set"],
                "temperature": row["temperature"],
                "acceptance length": f"{row['acceptance_length']:.2f}",
                "tree": f"{row.get('node_budget')} nodes",
                "speed-up here": f"{row['speedup']['estimate']:.2f}",
            }
            for row in results
        ],
    }


def report(run: Run) -> Path:
    """`report.html`, one file, and its figures beside it."""
    folder = run.folder
    found = facts(run)
    artefacts.write_jsonl(folder / "bench.jsonl", artefacts.read_jsonl(run.path("bench") / "bench.jsonl"))
    _write_scores(run)
    shown = {key.replace("_", " ").capitalize(): value for key, value in found.items() if isinstance(value, str)}
    target = run.recipe.target
    shown = {"Target": f"{target.name} ({target.dtype})", **shown}
    artefacts.write_json(folder / "provenance.json", {**provenance.collect(), "facts": shown})
    return write_report(folder, folder / REPORT)


def _write_scores(run: Run) -> None:
    """`selection.json` and `scores.jsonl` for the report: every sample's score, the tokens' text for a few."""
    selection = read_selection(run)
    store = FeatureStore(run.path("score"), checksums=False)
    names = [n for n in (*selection.kept, *selection.dropped) if n in selection.scores]
    rows = [{"id": n, "score": selection.scores[n], "kept": n not in selection.dropped} for n in names]
    artefacts.write_json(run.folder / "selection.json", rows)
    ranked = sorted(names, key=lambda n: selection.scores[n])
    spelled = {*ranked[:3], *ranked[-3:], *ranked[len(ranked) // 2 - 2 : len(ranked) // 2 + 2]}

    def scores() -> Iterator[dict[str, object]]:
        for name in names:
            sample = store[name]
            rows = sample.answer_rows
            values = flatness_from_log_norm(sample.statistics["log_norm"][rows], int(store.meta["vocab_size"]))
            row: dict[str, object] = {"id": name, "flatness": [round(v, 6) for v in values.tolist()]}
            if name in spelled:
                row["pieces"] = token_texts(run.target.tokenizer, sample.ids[sample.mask].tolist())
            yield row

    artefacts.write_jsonl(run.folder / "scores.jsonl", scores())


def export(run: Run, servers: Sequence[str]) -> list[Exported]:
    """The drafter as folders that servers load, under `export/`; prints the commands that serve them."""
    drafter, extras = _handed_over(run)
    done = []
    for server in servers:
        exported = hand_over.export(drafter, server, run.folder / "export" / server, extras)
        console.say(f"exported for {server}: {exported.folder}")
        for command in exported.commands:
            console.say(f"  {command}")
        done.append(exported)
    return done


def publish(run: Run, server: str, hub_id: str, private: bool = True) -> str:
    """The drafter as a repository on the hub: an export that names nothing of this machine; returns its address.

    Raises:
        UserError: the target has no public name, or as `export.push`.
    """
    check_id(hub_id)
    drafter, extras = _handed_over(run)
    if Path(drafter.target.name).exists():
        raise UserError(
            f"not pushed: the target is {drafter.target.name}, a path of this machine: say its public name with "
            "export.target_id=owner/name"
        )
    shown = {**extras.facts, "data": facts(run, public=True)["data"]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        hand_over.export(drafter, server, folder, replace(extras, facts=shown, published_as=hub_id))
        address = push(folder, hub_id, private=private)
    console.say(f"pushed for {server}: {address}")
    return address


def speculative_tokens(run: Run, most: int) -> list[Chain]:
    """Chains of 0 to `most` tokens: acceptance by replay of the dev answers, costs of this engine on this machine."""
    target = run.target
    drafter = load_drafter(run.path("train"), target)
    # Both costs now: a ratio of times measured at different loads of the machine would mean nothing.
    costs = profile.verify_cost(target, range(1, most + 2))
    answers = [answer for own in dev_by_set(run, training_source(run)).values() for answer in own]
    counts = metrics.count(replay(Single(drafter, ChainGrowth(most)), target.spec, answers, device=target.device))
    alphas = [0.0 if math.isnan(alpha) else alpha for alpha in counts.acceptance_by_depth]
    alphas = (alphas + [0.0] * most)[:most]
    drafting = [profile.draft_cost(target, Single(drafter, ChainGrowth(k))) for k in range(1, most + 1)]
    found = chains(alphas, costs, drafting)
    chosen = best(found)
    console.table(
        f"Chains on {len(answers)} dev answers, {counts.rounds} rounds: acceptance by replay, costs of this engine",
        ["speculative tokens", "α of the last", "acceptance length", "round cost", "speed-up expected"],
        [
            [
                c.tokens or "none",
                f"{c.acceptance:.2f}" if c.tokens else None,
                f"{c.acceptance_length:.2f}",
                f"{c.round_cost:.2f}",
                f"{c.speedup:.2f}" + (" <" if c is chosen else ""),
            ]
            for c in found
        ],
    )
    return found


def _handed_over(run: Run) -> tuple[Drafter, Extras]:
    """What exporters take: the run's drafter, with its target's card, and what goes beside the weights."""
    target, o = run.target, run.recipe
    trained = load_drafter(run.path("train"), target)
    name = str(target.model.config.name_or_path) if o.target.name == "smollm2" else o.target.name
    licence = o.export.target_licence or ("apache-2.0" if o.target.name == "smollm2" else "")
    card = target_card(target, o.export.target_id or name, licence)
    numbers = serving(chosen_growth(run.folder), o.export.tokens)
    drafter = exportable(trained, run.path("train"), card)
    stored = golden(drafter, target) if isinstance(drafter, HeadCheckpoint) else None
    return drafter, Extras(facts=facts(run), golden=stored, serving=numbers, keep_rope=o.export.keep_rope)
