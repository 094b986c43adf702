"""What a run would do: stage by stage, how long, how much memory and disk. Nothing is run, and all is estimated."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch

from draftsmith.foundation import console
from draftsmith.pipeline import STAGES, Run

# Tokens of a made prompt with its template, and of an answer under a cap of 128: measured on the quick start's prompts.
PROMPT_TOKENS = 75
ANSWER_SHARE = 0.8


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
    if recipe.features.store == "kept":
        store = int(store * kept)
    training = recipe.train.seconds or (recipe.train.steps or 0) * 1.0
    seconds = {
        "prompts": 1.0,
        "regenerate": write,
        "score": read,
        "select": 1.0,
        "features": 1.0 if recipe.features.store == "all" else read * kept,
        "train": training,
        "tune": 40.0,
        "bench": bench,
    }
    disk = {"score": store if recipe.features.store == "all" else positions * 37, "train": 60 << 20}
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
    memory = parameters * 2 + 12 * 9.8e6 + store + (1 << 30)
    free = shutil.disk_usage(_existing(run.folder)).free
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    console.say(
        f"{train} training, {dev} dev and {test} test prompts; about {console.count(positions)} positions; "
        f"about {console.duration(total)}, {console.size(int(memory))} of memory ({console.size(here)} here) and "
        f"{console.size(sum(disk.values()) + len(names) * (1 << 20))} of disk ({console.size(free)} free)"
    )
    if memory > 0.9 * here:
        console.warn("memory is tight: take fewer prompts (data.train) or features.store=kept")
    if sum(disk.values()) > 0.9 * free:
        console.warn("the disk is tight: take fewer prompts (data.train) or features.store=kept")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(name: str) -> tuple[float, int, int]:
    """(parameters, hidden size, layers) of a target folder; a 135M model's where it can't be told from here."""
    path = Path(name)
    if (path / "config.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path).get_text_config()
        weights = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2
        return weights or 1e9, config.hidden_size, config.num_hidden_layers
    return 134.5e6, 576, 30
