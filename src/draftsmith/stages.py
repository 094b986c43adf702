"""What each stage of a run does, in terms of the library's functions. `pipeline.py` says in which order and when again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.data import features as feature_store
from draftsmith.data import regenerate as regeneration
from draftsmith.data.conversations import Conversation, from_row, read_conversations, to_row
from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.data.prompts import make_prompts
from draftsmith.data.samples import Sample, samples_of
from draftsmith.decoding import profile
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle3 import Eagle3, default_layers, eagle3_options
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay, stored_answer
from draftsmith.evaluation.report.report import write_report
from draftsmith.evaluation.summary import Result, StageTime, Summary, result_table, write_summary
from draftsmith.export import hand_over
from draftsmith.export.adapter import golden, head_checkpoint, target_card
from draftsmith.export.checkpoint import Exported, Extras, Serving
from draftsmith.foundation import artefacts, console, provenance, seeding
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.foundation.options import validate
from draftsmith.numerics.distributions import TokenStatistics, flatness_from_log_norm
from draftsmith.selection.samples import ScoredSample, Selection
from draftsmith.selection.samples import select as choose
from draftsmith.selection.scores import SCORES, Evidence, token_scores
from draftsmith.target.detokenise import token_texts
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.trainer import Dev
from draftsmith.training.trainer import train as training

if TYPE_CHECKING:
    from draftsmith.pipeline import Run

Identity = dict[str, object]
SPLITS = ("train", "dev", "test")


def prompts(run: Run, out: Path, identity: Identity) -> None:
    """Make or read prompts and part them into train, dev and test (kind "prompts")."""
    o = run.recipe.data
    with artefacts.writing(out, "prompts", identity) as scratch:
        parts: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
        if o.path is None:
            for name in o.sets:
                for split, count in zip(SPLITS, (o.train, o.dev, o.test), strict=True):
                    parts[split] += make_prompts(name, split, count, o.seed)
        else:
            found, quarantine = read_conversations(o.path)
            if quarantine.rows:
                quarantine.write(scratch / "quarantine.jsonl")
                console.warn(
                    f"{len(quarantine)} rows set aside ({quarantine}); they are listed in {out / 'quarantine.jsonl'}"
                )
            parts = _parted(found, (o.train, o.dev, o.test), o.seed, o.path)
        for split, rows in parts.items():
            artefacts.write_jsonl(scratch / f"{split}.jsonl", (to_row(c) for c in rows))
        console.say(", ".join(f"{len(rows)} {split}" for split, rows in parts.items()) + " prompts")


def _parted(
    found: list[Conversation], counts: tuple[int, int, int], seed: int, name: str
) -> dict[str, list[Conversation]]:
    if len(found) < 3:
        raise UserError(
            f"{name}: {len(found)} usable conversations are too few; train, dev and test need at least one each"
        )
    train, dev, test = counts
    # Few conversations: dev and test take at most a fifth each.
    dev, test = min(dev, max(1, len(found) // 5)), min(test, max(1, len(found) // 5))
    order = [found[i] for i in seeding.shuffled(len(found), "split", seed)]
    label = Path(name).stem
    order = [replace(c, source=label) for c in order]
    return {"dev": order[:dev], "test": order[dev : dev + test], "train": order[dev + test : dev + test + train]}


def read_prompts(run: Run, split: str) -> list[Conversation]:
    """A split of the run's prompts."""
    return [from_row(row) for row in artefacts.read_jsonl(run.path("prompts") / f"{split}.jsonl")]


def regenerate(run: Run, out: Path, identity: Identity) -> None:
    """The target answers training and dev prompts (kind "conversations")."""
    asked = read_prompts(run, "train") + read_prompts(run, "dev")
    if run.recipe.data.keep_answers:
        with artefacts.writing(out, regeneration.KIND, identity) as scratch:
            artefacts.write_jsonl(scratch / regeneration.FILE, (to_row(c) for c in asked))
        return
    regeneration.regenerate(run.target, asked, run.recipe.regenerate, out, identity)


def _samples(run: Run, split: str | None = None) -> list[Sample]:
    """The answers as token samples; of one split, or of both."""
    wanted = {c.id for name in ("train", "dev") if split in (None, name) for c in read_prompts(run, name)}
    rows = [c for c in regeneration.read(run.path("regenerate")) if c.id.rsplit("#", 1)[0] in wanted or c.id in wanted]
    samples = [s for c in rows for s in samples_of(c, run.target.tokenizer)]
    longest = run.target.spec.max_positions
    return [s for s in samples if len(s.ids) <= longest]


def _layers(run: Run) -> tuple[int, ...]:
    return tuple(sorted(run.recipe.drafter.layers or default_layers(run.target.spec.layers)))


def score(run: Run, out: Path, identity: Identity) -> None:
    """Statistics of every token; with `features.store: all` the hidden states too, in the same pass (kind "features")."""
    both = run.recipe.features.store == "all"
    want = FeatureSpec(_layers(run), True) if both else FeatureSpec()
    samples = _samples(run)
    _say_size(run, samples, want)
    feature_store.store(run.target, samples, want, run.recipe.features, out, identity)


def _say_size(run: Run, samples: Sequence[Sample], want: FeatureSpec) -> None:
    positions = sum(len(s.ids) for s in samples)
    size = feature_store.estimated_bytes(positions, want, run.target.spec.hidden_size)
    console.say(f"{console.count(positions)} positions, about {console.size(size)} on disk")


def _scored(run: Run, store: FeatureStore, ids: Sequence[str]) -> list[ScoredSample]:
    name = run.recipe.select.method
    texts = {c.id: c.messages[-1].content for c in regeneration.read(run.path("regenerate"))}
    scored = []
    for i in ids:
        sample = store[i]
        rows = sample.answer_rows
        scores = {}
        if name in SCORES:
            columns = {column: values[rows] for column, values in sample.statistics.items()}
            evidence = Evidence(TokenStatistics(**columns, vocab_size=int(store.meta["vocab_size"])))
            scores = {name: token_scores(name, evidence)}
        scored.append(
            ScoredSample(i, int(rows.sum()), len(sample.ids), scores, text=texts.get(i, ""), complete=sample.complete)
        )
    return scored


def select(run: Run, out: Path, identity: Identity) -> None:
    """Choose the training samples (kind "selection"); what was kept is written as jsonl that any trainer takes."""
    store = FeatureStore(run.path("score"), checksums=False)
    train = {c.id for c in read_prompts(run, "train")}
    ids = [i for i in store.ids if i in train or i.rsplit("#", 1)[0] in train]
    sources = {c.id: _set_of(c) for c in read_prompts(run, "train")}
    groups: dict[str, list[str]] = {}
    for i in ids:
        groups.setdefault(
            sources[i if i in sources else i.rsplit("#", 1)[0]] if run.recipe.select.within_sets else "", []
        ).append(i)
    chosen = _joined([choose(_scored(run, store, group), run.recipe.select) for group in groups.values()], ids)
    kept = set(chosen.kept)
    with artefacts.writing(out, "selection", identity) as scratch:
        artefacts.write_jsonl(scratch / "selection.jsonl", chosen.to_rows())
        conversations = (c for c in regeneration.read(run.path("regenerate")) if c.id in kept)
        artefacts.write_jsonl(scratch / "kept.jsonl", (to_row(c) for c in conversations))
    share = 1 - chosen.positions_kept / max(1, chosen.positions_total)
    console.say(
        f"kept {len(chosen.kept)} of {len(ids)} samples, {console.count(chosen.tokens_kept)} of "
        f"{console.count(chosen.tokens_total)} answer tokens: an epoch of training takes {share:.0%} less time"
    )


def _joined(parts: Sequence[Selection], order: Sequence[str]) -> Selection:
    """Selections made within sets, as one."""
    kept = {i for part in parts for i in part.kept}

    def total(name: str) -> int:
        return sum(int(getattr(part, name)) for part in parts)

    return Selection(
        kept=tuple(i for i in order if i in kept),
        dropped={i: reason for part in parts for i, reason in part.dropped.items()},
        scores={i: value for part in parts for i, value in part.scores.items()},
        thresholds=tuple(t for part in parts for t in part.thresholds),
        tokens_kept=total("tokens_kept"),
        tokens_total=total("tokens_total"),
        positions_kept=total("positions_kept"),
        positions_total=total("positions_total"),
    )


def read_selection(run: Run) -> Selection:
    """The run's selection."""
    return Selection.from_rows(artefacts.read_jsonl(run.path("select") / "selection.jsonl"))


def features(run: Run, out: Path, identity: Identity) -> None:
    """Hidden states of the kept training samples and the dev samples; nothing to do where the score pass stored them."""
    if run.recipe.features.store == "all":
        with artefacts.writing(out, feature_store.KIND, {**identity, "stored_by": "score"}):
            console.say("stored by the score pass")
        return
    kept = set(read_selection(run).kept)
    dev = {s.id for s in _samples(run, "dev")}
    samples = [s for s in _samples(run) if s.id in kept or s.id in dev]
    want = FeatureSpec(_layers(run), True)
    _say_size(run, samples, want)
    feature_store.store(run.target, samples, want, run.recipe.features, out, identity)


def stored_features(run: Run) -> FeatureStore:
    """The store that training reads."""
    return FeatureStore(run.path("score" if run.recipe.features.store == "all" else "features"), checksums=False)


def _dev(run: Run, store: FeatureStore, growth: GrowthOptions) -> Dev:
    dev = {s.id for s in _samples(run, "dev")}
    answers = [stored_answer(store[i]) for i in store.ids if i in dev]
    return Dev(run.target.spec, answers, growth.build())


def vocabulary(run: Run, samples: Sequence[StoredSample], size: int) -> VocabMap:
    """The draft vocabulary: the tokens most written, and the likeliest at each position; end and special tokens always."""
    spec = run.target.spec
    counts = torch.zeros(spec.vocab_size, dtype=torch.int64)
    for sample in samples:
        written = sample.ids[sample.mask]
        likeliest = sample.statistics["argmax"][sample.answer_rows].long()
        for tokens in (written, likeliest):
            counts.index_add_(0, tokens, torch.ones_like(tokens))
    always = {*spec.eos_ids, *getattr(run.target.tokenizer, "all_special_ids", [])}
    return VocabMap.from_counts(counts, size, [i for i in always if i < spec.vocab_size], spec.vocab_size)


def train(run: Run, out: Path, identity: Identity) -> None:
    """Train the head on what was kept (kind "drafter")."""
    target, o = run.target, run.recipe
    store = stored_features(run)
    kept = list(read_selection(run).kept)
    dev = _dev(run, store, o.growth)
    vocab = vocabulary(run, [store[i] for i in kept], o.drafter.draft_vocab_size)
    written = torch.cat([torch.tensor(a.ids[a.prompt_length :]) for a in dev.answers])
    covered = vocab.coverage(torch.bincount(written, minlength=target.spec.vocab_size))
    filled = f"; {vocab.filled} of them were never written and fill it up" if vocab.filled else ""
    console.say(
        f"draft vocabulary of {console.count(vocab.size)} tokens covers {covered:.1%} of the dev answers{filled}"
    )
    head = fresh_head(run, vocab)
    teacher = target.model.get_output_embeddings().weight[vocab.target_ids.to(target.device)]
    log = run.folder / "training.jsonl"
    found = training(head, teacher, store, kept, dev, o.train, out, log, {**identity, "covered": round(covered, 4)})
    _say_saved(run, log)
    console.say(
        f"best checkpoint: step {found['best_step']} of {found['steps']}, dev acceptance length {found['dev_acceptance_length']:.3f}"
    )


def _say_saved(run: Run, log: Path) -> None:
    """What selection saved: the same epochs over all samples would have taken so much longer."""
    selection = read_selection(run)
    steps = [row for row in artefacts.read_jsonl(log) if "loss" in row]
    seconds = sum(float(row["seconds"]) for row in steps)
    left_out = selection.positions_total - selection.positions_kept
    if left_out and selection.positions_kept:
        saved = seconds * left_out / selection.positions_kept
        console.say(
            f"selection saved {console.duration(saved)}: as many epochs over all samples would have taken "
            f"{console.duration(seconds + saved)} instead of {console.duration(seconds)} of training"
        )


def fresh_head(run: Run, vocab: VocabMap) -> Eagle3:
    """An untrained head: seeded weights; its `lm_head` and last norm begin as the target's."""
    target = run.target
    config = target.model.config.get_text_config()
    try:
        o = eagle3_options(config, target.spec, vocab.size, run.recipe.drafter.layers)
    except ValueError as problem:
        raise UserError(f"drafter.layers: {problem}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key("head", run.recipe.train.seed) % 2**31)
        head = Eagle3(o, vocab, target.embedding.float())
    head.begin_from(target.model.get_output_embeddings().weight, getattr(target.model.base_model, "norm", None))
    return head.to(target.device)


def tune(run: Run, out: Path, identity: Identity) -> None:
    """Measure what verification and drafting cost here, replay dev with each growth, take the fastest (kind "growth")."""
    target = run.target
    head = load_drafter(run.path("train"), target)
    dev = _dev(run, stored_features(run), run.recipe.growth)
    costs = profile.verify_cost(target)
    rows: list[dict[str, Any]] = []
    with console.progress("trying draft trees on dev", len(run.recipe.tune.growths), "trees") as bar:
        for growth in run.recipe.tune.growths:
            single = Single(head, growth.build())
            found = metrics.count(replay(single, target.spec, dev.answers))
            draft = profile.draft_cost(target, single)
            verify = profile.interpolated(costs, 1 + growth.build().budget)
            rows.append(
                {
                    "growth": growth.model_dump(mode="json"),
                    "acceptance_length": found.acceptance_length,
                    "draft_ms": draft,
                    "verify_ms": verify,
                    "speedup": found.acceptance_length * profile.interpolated(costs, 1) / (draft + verify),
                }
            )
            bar.advance(1)
    best = max(rows, key=lambda row: float(row["speedup"]))
    console.table(
        "Draft trees on dev: acceptance by replay, cost measured here",
        ["nodes", "depth", "width", "acceptance length", "draft ms", "verify ms", "speed-up expected"],
        [
            [
                *(row["growth"][key] for key in ("node_budget", "depth", "width")),
                f"{row['acceptance_length']:.2f}",
                f"{row['draft_ms']:.1f}",
                f"{row['verify_ms']:.1f}",
                f"{row['speedup']:.2f}" + (" <" if row is best else ""),
            ]
            for row in rows
        ],
    )
    with artefacts.writing(out, "growth", identity) as scratch:
        artefacts.write_json(scratch / "growth.json", best["growth"])
        artefacts.write_json(
            scratch / "profile.json", {"verify_ms": {str(n): c for n, c in costs.items()}, "growths": rows}
        )


def chosen_growth(run_folder: Path) -> GrowthOptions:
    """The growth that `tune` chose."""
    path = run_folder / "growth" / "growth.json"
    return validate(GrowthOptions, artefacts.read_json(path), str(path))


def bench(run: Run, out: Path, identity: Identity) -> None:
    """Plain and speculative decoding of the test prompts in the same engine (kind "bench")."""
    head = load_drafter(run.path("train"), run.target)
    growth = chosen_growth(run.folder)
    sets: dict[str, list[Conversation]] = {}
    for conversation in read_prompts(run, "test"):
        sets.setdefault(_set_of(conversation), []).append(conversation)
    conditions = {"drafter": artefacts.checksum(run.path("train")), "growth": growth.model_dump(mode="json")}
    named = {"eagle3": Single(head, growth.build())}
    with artefacts.writing(out, "bench", identity, resume=True) as scratch:
        try:
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        except StaleError:
            (scratch / "bench.jsonl").unlink()
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        found = benching.results(rows)
        artefacts.write_json(scratch / "results.json", [r.model_dump(mode="json") for r in found])


def _set_of(conversation: Conversation) -> str:
    return conversation.source or conversation.id.split("/")[0]


def finish(run: Run) -> None:
    """Write what people look at and hand over: `summary.json`, the exported checkpoint, `report.html`."""
    started = time.perf_counter()
    summarise(run)
    export(run, run.recipe.export.to)
    report(run)
    run.spent("report and export", time.perf_counter() - started, anew=True)
    summary = summarise(run)
    columns, rows = result_table(summary.results)
    console.table("Plain against speculative decoding, same engine, test prompts", columns, rows)


def summarise(run: Run) -> Summary:
    """`summary.json` from the bench's results and the stages' times (docs/summary.md)."""
    results = [Result.model_validate(row) for row in artefacts.read_json(run.path("bench") / "results.json")]
    times = [StageTime(name=name, seconds=seconds) for name, seconds in run.seconds().items()]
    summary = Summary(schema=1, results=results, stages=times)
    write_summary(run.folder / "summary.json", summary)
    return summary


def facts(run: Run) -> dict[str, object]:
    """What the report and the model card say of the run."""
    o = run.recipe
    selection = read_selection(run)
    training = artefacts.read_json(run.path("train") / "training.json")
    results = artefacts.read_json(run.path("bench") / "results.json")
    asked = o.data.path or f"made prompts ({', '.join(o.data.sets)})"
    answers = "the file's own answers" if o.data.keep_answers else "answers by the target"
    return {
        "data": f"{asked}; {answers}; {len(selection.kept)} samples kept by {o.select.method}, {selection.tokens_kept} answer tokens",
        "training": f"EAGLE-3, {o.drafter.draft_vocab_size} draft tokens, {training['steps']} steps, best checkpoint at {training['best_step']}",
        "training_cost": {
            name: f"{seconds:.0f} s"
            for name, seconds in run.seconds().items()
            if name not in ("bench", "report and export")
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
    return write_report(folder, folder / "report.html")


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
    target = run.target
    head = load_drafter(run.path("train"), target)
    name = str(target.model.config.name_or_path) if run.recipe.target.name in ("smollm2",) else run.recipe.target.name
    card = target_card(target, name, "apache-2.0" if run.recipe.target.name == "smollm2" else "")
    growth = chosen_growth(run.folder)
    serving = Serving(depth=growth.depth, top_k=growth.width, nodes=growth.build().budget)
    extras = Extras(facts=facts(run), golden=golden(head), serving=serving)
    done = []
    for server in servers:
        exported = hand_over.export(head_checkpoint(head, card), server, run.folder / "export" / server, extras)
        console.say(f"exported for {server}: {exported.folder}")
        for command in exported.commands:
            console.say(f"  {command}")
        done.append(exported)
    return done
