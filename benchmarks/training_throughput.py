"""Training throughput: the same EAGLE-3 head on the same samples with draftsmith and with `speculators`, by turns.

    scripts/install-speculators.sh .venv-speculators
    draftsmith features -C runs/speed             # after prompts, regenerate, score and select of the same run
    python benchmarks/training_throughput.py runs/speed --speculators .venv-speculators/bin/python

The same on both sides: head (sizes, draft vocabulary, no EAGLE-3.1 norms), samples, stored states, unrolled steps, rows
(one of 512 positions a step), forward KL, AdamW, clipping by norm, warm-up and cosine, bfloat16 products over
float32 weights, threads, number of steps. Each turn is a process of its own. Positions that are no padding are counted;
seconds are those of whole steps with fetching, without the first steps of a process; memory is its largest
resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch

from draftsmith import stages
from draftsmith.commands.stage import opened
from draftsmith.data.features import FeatureStore
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.target import gguf
from draftsmith.target.vocabulary import VocabMap

WARM = 3
SHIM = Path(__file__).parent / "peers" / "train_speculators.py"
OURS, THEIRS = "draftsmith", "speculators"


def options(o: argparse.Namespace) -> list[str]:
    """The recipe's options that the comparison fixes."""
    train = {
        "seconds": "null",
        "epochs": "null",
        "steps": o.steps,
        "evaluations": 1,
        "unroll_steps": o.unroll,
        "step_decay": 1.0,
        "row_length": o.row,
        "batch_positions": o.row,
        "learning_rate": 1e-3,
        "precision": "bfloat16",
    }
    drafter = {"kind": "eagle3", "draft_vocab_size": o.draft_vocabulary}
    groups = (("train", train), ("drafter", drafter))
    return [f"{group}.{name}={value}" for group, values in groups for name, value in values.items()]


def write_data(o: argparse.Namespace) -> VocabMap:
    """The run's kept samples as speculators stores them: data set, states by sample, vocabulary."""
    import datasets
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    run = opened(o.run, None, options(o))
    store = FeatureStore(run.path("score" if run.recipe.features.store == "all" else "features"))
    vocab = stages.vocabulary(run)
    scale = AutoModelForCausalLM.from_pretrained(folder_of_target()).model.norm.weight.detach().float()
    kept = [store[i] for i in stages.read_selection(run).kept]
    data = o.out / "data"
    shutil.rmtree(data, ignore_errors=True)
    rows = [{"input_ids": s.ids.tolist(), "loss_mask": s.mask.long().tolist(), "seq_len": len(s.ids)} for s in kept]
    datasets.Dataset.from_list(rows).with_format("torch").save_to_disk(data)
    (data / "hidden_states").mkdir()
    for number, sample in enumerate(kept):
        # speculators norms the last state itself: this is one that its norm takes to ours
        before = (sample.hidden["final"].float() / scale).to(torch.bfloat16)
        states = [sample.hidden[layer] for layer in sorted(k for k in sample.hidden if k != "final")]
        both = {"hidden_states": torch.stack([*states, before], 1).contiguous(), "token_ids": sample.ids}
        save_file(both, data / "hidden_states" / f"hs_{number}.safetensors")
    np.save(data / f"d2t-{vocab.size}.npy", vocab.d2t.numpy())
    np.save(data / f"t2d-{vocab.size}.npy", vocab.t2d.numpy())
    return vocab


def folder_of_target() -> Path:
    return gguf.convert(gguf.smollm2(), gguf.cache_root())


def ours(o: argparse.Namespace, out: Path) -> list[str]:
    """The command line that trains with draftsmith, in a copy of the run."""
    return [sys.executable, "-m", "draftsmith", "train", "--redo", "-C", str(o.out / "run"), *options(o)]


def steps_of(o: argparse.Namespace, name: str, out: Path) -> list[dict[str, float]]:
    """Positions and seconds of each step of the turn that has just ended."""
    if name == THEIRS:
        found: list[dict[str, float]] = json.loads(out.read_text())
        return found
    rows = [row for row in artefacts.read_jsonl(o.out / "run" / "training.jsonl") if "loss" in row]
    return [{"seconds": r["seconds"], "positions": r["positions_per_second"] * r["seconds"]} for r in rows]


def theirs(o: argparse.Namespace, out: Path) -> list[str]:
    """The command line that trains with speculators."""
    named = {
        "speculator-type": "eagle3",
        "verifier-name-or-path": folder_of_target(),
        "data-path": o.out / "data",
        "draft-vocab-size": o.draft_vocabulary,
        "total-seq-len": o.row,
        "train-data-ratio": 0.9,
        "num-workers": 0,
        "on-missing": "raise",
        "draft-attn-impl": "sdpa",
        "full-attention-indices": 0,
        "loss-implementation": "eager",
        "ttt-steps": o.unroll,
        "ttt-step-loss-decay": 1.0,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight-decay": 0.01,
        "scheduler-type": "cosine",
        "scheduler-warmup-ratio": 0.05,
        "epochs": 1,
        "max-steps": o.steps,
        "checkpoint-freq": 1,
        "log-freq": 1,
        "save-path": o.out / "speculators",
        "log-dir": o.out / "logs",
    }
    flags = ["--no-resume-from-checkpoint", "--no-norm-before-fc", "--no-norm-output", "--no-norm-before-residual"]
    return [str(o.speculators), str(SHIM), str(out), *(f"--{n}={v}" for n, v in named.items()), *flags]


def turn(o: argparse.Namespace, name: str, number: int) -> dict[str, float]:
    """Run one side; positions a second after the warm-up, and the process's largest resident set."""
    out, log = o.out / f"{name}-{number}.json", o.out / f"{name}.log"
    command = ours(o, out) if name == OURS else theirs(o, out)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed: see {log}")
    steps = steps_of(o, name, out)[WARM:]
    positions, seconds = (sum(step[key] for step in steps) for key in ("positions", "seconds"))
    return {"positions_per_second": positions / seconds, "peak_bytes": used.ru_maxrss * 1024, "steps": len(steps)}


def compare(o: argparse.Namespace) -> None:
    """By turns, and the table."""
    o.out.mkdir(parents=True, exist_ok=True)
    write_data(o)
    shutil.rmtree(o.out / "run", ignore_errors=True)
    shutil.copytree(o.run, o.out / "run", copy_function=os.link, ignore=shutil.ignore_patterns("training.jsonl"))
    turns: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for number in range(o.rounds):
        for name in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            turns[name].append(turn(o, name, number))
            found = turns[name][-1]
            console.say(f"{name}: {found['positions_per_second']:.0f} positions/s, {console.size(found['peak_bytes'])}")
    speed = {name: median(t["positions_per_second"] for t in own) for name, own in turns.items()}
    peak = {name: max(t["peak_bytes"] for t in own) for name, own in turns.items()}
    shape = {name: getattr(o, name) for name in ("steps", "row", "unroll", "draft_vocabulary", "rounds")}
    facts = {"options": shape, "turns": turns, "ratio": speed[OURS] / speed[THEIRS], "provenance": provenance.collect()}
    artefacts.write_json(o.out / "throughput.json", facts)
    table = [
        [name, f"{speed[name]:.0f}", f"{speed[name] / speed[THEIRS]:.2f}", console.size(int(peak[name]))]
        for name in turns
    ]
    console.table("Training an EAGLE-3 head", ["tool", "positions/s", "ratio", "peak memory"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that has its features")
    parser.add_argument("--speculators", type=Path, required=True, help="python of speculators' environment")
    parser.add_argument("--out", type=Path, default=Path("build/throughput"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", type=int, default=512)
    parser.add_argument("--unroll", type=int, default=3)
    parser.add_argument("--draft-vocabulary", type=int, default=8192)
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
