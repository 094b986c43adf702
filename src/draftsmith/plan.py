"""What a run would do: stage by stage, how long, how much memory and disk. Nothing is run, and all is estimated.

Training is looked at more closely, for it needs most: its memory follows from the head's shape, and where the features
are there three steps are timed.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from draftsmith import stages
from draftsmith.data.features import FeatureStore
from draftsmith.drafters.head import HeadOptions, sizes
from draftsmith.foundation import console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.pipeline import STAGES, Run
from draftsmith.recipe import Recipe
from draftsmith.selection.tokens import WeightOptions
from draftsmith.target import gguf
from draftsmith.target.protocol import TargetSpec
from draftsmith.training import algorithms
from draftsmith.training.batches import epoch_plan
from draftsmith.training.memory import TrainingMemory, training_memory
from draftsmith.training.trainer import step_seconds

# Tokens of a made prompt with its template, and of an answer under a cap of 128: measured on the quick start's prompts.
PROMPT_TOKENS = 75
ANSWER_SHARE = 0.8
TIGHT, REFUSED = 0.9, 1.3  # shares of the memory there is, from which is warned and refused
LESS_MEMORY = "take shorter steps (train.batch_positions), parts of them (train.accumulation) or train.checkpoint_steps"


def _machine() -> tuple[float, float]:
    """(bfloat16 matrix GFLOP/s, microseconds of a small operation) here, in a tenth of a second."""
    a = torch.randn(512, 576).bfloat16()
    b = torch.randn(576, 1536).bfloat16()
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        a @ b
        count += 1
    flops = count * 2 * 512 * 576 * 1536 / (time.perf_counter() - started)
    x = torch.zeros(576)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.02:
        x + x
        count += 1
    return flops / 1e9, (time.perf_counter() - started) / count * 1e6


def show(run: Run, until: str | None = None) -> None:
    """Print the plan as a table, with the whole below it."""
    recipe = run.recipe
    counts = recipe.data.counts().values()
    sets = len(counts)
    train, dev, test = (sum(column) for column in zip(*counts, strict=True))
    answer = int(recipe.regenerate.max_new_tokens * ANSWER_SHARE)
    positions = (train + dev) * (PROMPT_TOKENS + answer)
    parameters, hidden, layers = _size(recipe.target.name)
    gflops, op = _machine()
    # A pass is its arithmetic plus the dispatch of some 25 operations a layer.
    dispatch = layers * 25 * max(op, 1.0) * 1.6e-6
    read = positions * 2 * parameters / (0.35 * gflops * 1e9)
    batches = max(1, (train + dev) // recipe.regenerate.batch)
    step = dispatch + recipe.regenerate.batch * 2 * parameters / (0.25 * gflops * 1e9)
    write = batches * recipe.regenerate.max_new_tokens * step
    plain = dispatch + 2 * parameters / 15e9
    tokens = min(test, recipe.bench.prompts * sets) * recipe.bench.max_new_tokens * len(recipe.bench.temperatures)
    bench = tokens * plain * 1.8 * recipe.bench.repeats
    kept = recipe.select.ratio or (1.0 if recipe.select.method == "full" else 0.5)
    store = positions * (4 * hidden * 2 + 37)
    if recipe.features.store != "all":
        store = int(store * kept) if recipe.features.store == "kept" else 0
    written = recipe.regenerate
    # the target scores its answers as it writes them, unless a server writes or the answers are given
    scored = written.statistics and written.server is None and not recipe.data.keep_answers
    scored = scored and recipe.features.store != "all"
    trained = training(run, until == "train", until == "train")
    estimated = trained.seconds or (trained.steps or 0) * 1.0
    seconds = {
        "prompts": 1.0,
        "regenerate": write,
        "score": 1.0 if scored else read,
        "select": 1.0,
        "features": read * kept if recipe.features.store == "kept" else 1.0,
        "train": recipe.train.seconds or estimated,
        "tune": 40.0,
        "bench": bench,
    }
    disk = {"score": store if recipe.features.store == "all" else positions * 37, "train": trained.disk}
    if recipe.features.store == "kept":
        disk["features"] = store
    names = list(STAGES)
    names = names[: names.index(until) + 1] if until else names
    rows = []
    for name in names:
        status = run.status(name)
        done = status == "done"
        rows.append(
            [
                name,
                STAGES[name].note,
                status,
                "–" if done else console.duration(seconds[name]),
                console.size(disk.get(name, 1 << 20)),
            ]
        )
    console.table("Plan (estimates for this machine)", ["stage", "what", "state", "time", "disk"], rows)
    total = sum(seconds[n] for n in names if run.status(n) != "done")
    memory = max(parameters * 2 + (1 << 30), trained.memory)
    free = shutil.disk_usage(_existing(run.folder)).free
    here = memory_here()
    console.say(
        f"{train} training, {dev} dev and {test} test prompts; about {console.count(positions)} positions; "
        f"about {console.duration(total)}, {console.size(int(memory))} of memory ({console.size(here)} here) and "
        f"{console.size(sum(disk.values()) + len(names) * (1 << 20))} of disk ({console.size(free)} free)"
    )
    steps = "steps that fit into its time box" if trained.steps is None else f"{console.count(trained.steps)} steps"
    probed = "" if trained.step_seconds is None else f", {console.duration(trained.step_seconds)} each (timed)"
    console.say(
        f"training: {console.count(trained.parameters)} parameters, {console.count(trained.positions)} tokens an "
        f"epoch, {steps}{probed}; peak memory {console.size(trained.memory)}"
    )
    if memory > TIGHT * here:
        console.warn(f"memory is tight: {LESS_MEMORY}")
    if sum(disk.values()) > TIGHT * free:
        console.warn("the disk is tight: take fewer prompts (data.train) or features.store=kept")


@dataclass(frozen=True)
class TrainingPlan:
    """What training would take.

    Attributes:
        parameters: that are trained; positions: tokens of an epoch; steps: None where a time box will tell.
        memory: bytes of the process at its peak, features not counted (they are mapped from the disk).
        disk: bytes of its state and the drafter.
        step_seconds, seconds: of a step and of all, where three steps could be timed.
    """

    parameters: int
    positions: int
    steps: int | None
    memory: int
    disk: int
    step_seconds: float | None = None
    seconds: float | None = None


def training(run: Run, probe: bool = False, alone: bool = True) -> TrainingPlan:
    """What training would take, from the target's configuration; with `probe` three steps are timed, if they can be;
    `alone`: in a process that does nothing else."""
    o = run.recipe
    config, target_parameters = _target(o.target.name)
    spec = TargetSpec(
        o.target.name, "", config.vocab_size, config.hidden_size, config.num_hidden_layers, 1 << 12, (), "bfloat16"
    )
    width = 4 if o.target.dtype == "float32" else 2
    if o.drafter.kind == "standalone":
        parameters, taken = _standalone(o, config, spec, width)
    else:
        parameters, taken = _head(o, config, spec, width)
    # training by itself, on stored states, has the embeddings only
    shared = width * (_embeddings(config) if stages.reads_stored(o) and alone else target_parameters)
    lengths = _kept_lengths(run)
    positions = sum(lengths)
    steps = o.train.steps
    if o.train.epochs is not None:
        epochs = (
            epoch_plan(
                lengths[: o.train.seen(len(lengths), epoch)],
                o.train.row_length,
                o.train.batch_positions,
                o.train.seed,
                epoch,
            )
            for epoch in range(o.train.epochs)
        )
        steps = sum(map(len, epochs))
    memory = _process_bytes() + shared + taken.peak
    found = TrainingPlan(parameters, positions, steps, memory, taken.saving + 8 * parameters)
    if not probe or not (run.status("features") == run.status("select") == "done"):
        return found
    t = stages.training_of(run, stages.vocabulary(run), reference=False)
    twice = o.train.reference == "trained"  # its losses are not there yet: a step is timed without them
    timed = o.train.model_copy(update={"weights": WeightOptions()}) if twice else o.train
    step, evaluation = step_seconds(t.head, t.objective, t.source, t.kept, t.dev, timed, t.reference)
    whole = (1 + twice) * (o.train.seconds or step * (steps or 0) + evaluation * o.train.evaluations)
    return replace(found, step_seconds=step, seconds=whole)


def _head(o: Recipe, config: Any, spec: TargetSpec, width: int) -> tuple[int, TrainingMemory]:
    """(parameters, memory) of a head."""
    kind = o.drafter.kind
    try:
        head = algorithms.blank_head(
            kind,
            config,
            spec,
            min(o.drafter.draft_vocab_size, spec.vocab_size),
            o.drafter.layers,
            o.drafter.norms or (),
        )
    except ValueError as problem:
        raise UserError(f"drafter.layers: {problem}") from None
    parameters = sum(p.numel() for p in head.parameters())
    features = len(head.wants.names) * spec.hidden_size
    unrolled = algorithms.unrolled(kind, o.train, o.hass)
    return parameters, training_memory(head.options, parameters, features, unrolled, o.train, ranks.world(), width)


def _standalone(o: Recipe, config: Any, spec: TargetSpec, width: int) -> tuple[int, TrainingMemory]:
    """(parameters that are trained, memory) of a standalone draft: as many layers as it has, one unrolled step each."""
    s = o.drafter.standalone
    layers = s.keep_layers if isinstance(s.keep_layers, int) else len(s.keep_layers)
    if s.folder:
        config, parameters = _target(s.folder)
        layers = config.num_hidden_layers
    else:
        cut = copy.deepcopy(config)
        cut.num_hidden_layers = layers
        if getattr(cut, "layer_types", None):
            cut.layer_types = cut.layer_types[:layers]
        parameters = _blank_parameters(cut)
    if not s.train_embedding:
        parameters -= _embeddings(config)
    shape = HeadOptions(**sizes(config, spec, min(o.drafter.draft_vocab_size, spec.vocab_size)))
    steps = (layers, o.train.checkpoint_steps)
    return parameters, training_memory(shape, parameters, spec.hidden_size, steps, o.train, ranks.world(), width)


def _embeddings(config: Any) -> int:
    """Numbers of a model's input and output embedding."""
    return int(config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2))


def check(run: Run, force: bool = False, anew: bool = False, alone: bool = True) -> None:
    """Warn where training would need nearly all memory there is; where it is done, only if it is to be done `anew`.

    Raises:
        UserError: it would need more than 1.3 times as much, and `force` is not said.
    """
    try:
        if run.status("train") == "done" and not anew:
            return
        needed, here = training(run, alone=alone).memory, memory_here()
    except (UserError, ValueError):
        return  # a damaged artefact or a wrong option: the stage that meets it says so, and knows whether it matters
    said = f"training would take {console.size(needed)} of memory, and there are {console.size(here)}"
    if needed > REFUSED * here and not force:
        raise UserError(f"{said}: {LESS_MEMORY}; --force tries it all the same")
    if needed > TIGHT * here:
        console.warn(f"{said}: {LESS_MEMORY}")


def memory_here() -> int:
    """Bytes of memory that training can have: the GPU's where there is one, else the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _process_bytes() -> int:
    """What this process takes now: the interpreter and its libraries."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20


def _kept_lengths(run: Run) -> list[int]:
    """Tokens of each sample to train on; estimated where they are not chosen yet."""
    o = run.recipe
    if run.status("select") == "done":
        store = FeatureStore(run.path("score"), checksums=False)
        lengths = dict(zip(store.ids, store.lengths, strict=True))
        return [lengths[i] for i in stages.read_selection(run).kept]
    samples = sum(train for train, _, _ in o.data.counts().values())
    kept = o.select.ratio or (1.0 if o.select.method == "full" else 0.5)
    return [PROMPT_TOKENS + int(o.regenerate.max_new_tokens * ANSWER_SHARE)] * max(1, int(samples * kept))


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(name: str) -> tuple[float, int, int]:
    """(parameters, hidden size, layers) of a target."""
    config, parameters = _target(name)
    return parameters, config.hidden_size, config.num_hidden_layers


@cache
def _target(name: str) -> tuple[Any, int]:
    """A target's text configuration and its number of parameters, without its weights."""
    from transformers import AutoConfig

    path: str | Path = name
    if name == "smollm2" or name.endswith(".gguf"):
        path = gguf.convert(gguf.smollm2() if name == "smollm2" else Path(name), gguf.cache_root())
    try:
        config = AutoConfig.from_pretrained(path)
        parameters = _blank_parameters(config)
    except (OSError, ValueError) as problem:
        raise UserError(f"{name}: its configuration can't be read: {str(problem).splitlines()[0]}") from problem
    return config.get_text_config(), parameters


def _blank_parameters(config: Any) -> int:
    """Parameters of a model of this configuration, without making it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())
