"""EAGLE-2, HASS and EAGLE-3 on the same answers for the same time: which head decodes best for what its training cost.

    DRAFTSMITH_DATA=DIR python benchmarks/heads_at_equal_time.py prepare runs/heads        # answers and states, once
    python benchmarks/heads_at_equal_time.py steps runs/heads --seconds 300                # on an idle machine: steps
    python benchmarks/heads_at_equal_time.py train runs/heads                              # may share the machine
    DRAFTSMITH_DATA=DIR draftsmith bench --benchmark gsm8k,mt-bench --prompts 20 --max-new-tokens 128 -C runs/heads \
        --drafters eagle-2=runs/heads/eagle --drafters hass=runs/heads/hass --drafters eagle-3=runs/heads/eagle3

Time is turned into steps first, the heads measured by turns, so that the trainings need no idle machine. `DIR` holds
`train_math_gsm8k.jsonl`, `train_chat_oasst_prompts.jsonl` and the benchmarks (`data/benchmarks.py`). All heads draft
the same tree, the engine's default.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median

import yaml

from draftsmith import recipe as recipes
from draftsmith import stages
from draftsmith.commands.stage import RECIPE, opened
from draftsmith.data import benchmarks
from draftsmith.data.conversations import Conversation, Message, read_conversations, to_row
from draftsmith.foundation import artefacts, console
from draftsmith.pipeline import Run
from draftsmith.training import trainer

HERE = Path(__file__).with_suffix(".yaml")
# what is trained under each name: options of the recipe
HEADS: dict[str, list[str]] = {
    "eagle": ["drafter.kind=eagle"],
    "hass": ["drafter.kind=hass"],
    "eagle3": ["drafter.kind=eagle3"],
    "eagle3-detached": ["drafter.kind=eagle3", "train.detach_steps=true"],
    "eagle3-checkpointed": ["drafter.kind=eagle3", "train.checkpoint_steps=true"],
}
DEFAULT = "eagle,hass,eagle3"
LONGEST = 600  # characters of a chat prompt
ROUNDS = 5


def prepare(folder: Path, recipe: Path, overrides: list[str]) -> None:
    """Prompts, half GSM8K's training problems as the benchmark puts them, half chat; then all stages up to features."""
    data, prompts = Path(os.environ[benchmarks.VARIABLE]), folder / "prompts.jsonl"
    run = Run(recipes.load(str(recipe), [f"data.path={prompts}", *overrides]), folder)
    count = sum(run.recipe.data.counts()[str(prompts)]) // 2 + 1
    problems, _ = read_conversations(data / "train_math_gsm8k.jsonl")
    chat, _ = read_conversations(data / "train_chat_oasst_prompts.jsonl")
    asked = [(c, benchmarks.final_number(c.messages[0].content)) for c in problems[:count]]
    short = [(c, c.messages[0].content) for c in chat if len(c.messages[0].content) <= LONGEST]
    both = [Conversation(c.id, (Message("user", text),), c.source) for c, text in asked + short[:count]]
    artefacts.write_jsonl(prompts, map(to_row, both))
    artefacts.write_text(folder / RECIPE, yaml.safe_dump(run.recipe.model_dump(mode="json")))
    for stage in ("prompts", "regenerate", "score", "select", "features"):
        run.run(stage)


def heads(folder: Path, steps: dict[str, int]) -> dict[str, tuple[Run, stages.Training]]:
    """Each head, untrained, with the answers and states that all share."""
    shared = opened(folder, None, [])
    found: dict[str, tuple[Run, stages.Training]] = {}
    for name, number in steps.items():
        run = opened(folder, None, [*HEADS[name], f"train.steps={number}"])
        run.target = shared.target
        found[name] = run, stages.training_of(run, stages.vocabulary(run))
    return found


def steps(folder: Path, seconds: float, names: list[str]) -> None:
    """How many steps of each head take so many seconds here: `steps.json`."""
    times: dict[str, list[float]] = {name: [] for name in names}
    made = heads(folder, dict.fromkeys(names, 1))
    for _ in range(ROUNDS):
        for name, (run, t) in made.items():
            step, _ = trainer.step_seconds(t.head, t.objective, t.source, t.kept, t.dev, run.recipe.train)
            times[name].append(step)
    rows = {name: {"step_seconds": median(own), "steps": int(seconds / median(own))} for name, own in times.items()}
    artefacts.write_json(folder / "steps.json", {"seconds": seconds, "heads": rows})
    table = [[name, f"{min(times[name]):.3f}–{max(times[name]):.3f}", str(row["steps"])] for name, row in rows.items()]
    console.table(f"Steps in {seconds:g} s", ["head", "seconds a step", "steps"], table)


def train(folder: Path) -> None:
    """Each head for its number of steps; those that are there already are left as they are."""
    plan = artefacts.read_json(folder / "steps.json")
    lengths = {name: int(row["steps"]) for name, row in plan["heads"].items()}
    for name, (run, t) in heads(folder, lengths).items():
        if not (folder / name / artefacts.MANIFEST).is_file():
            parts = (t.head, t.objective, t.source, t.kept, t.dev, run.recipe.train, folder / name)
            found = trainer.train(*parts, folder / f"{name}.jsonl", {"features": artefacts.checksum(run.path("score"))})
            console.say(f"{name}: dev acceptance length {found['dev_acceptance_length']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "steps", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="options of the recipe, dotted (prepare)")
    parser.add_argument("--recipe", type=Path, default=HERE)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--heads", default=DEFAULT, help=f"by commas, of {', '.join(HEADS)} (steps)")
    o = parser.parse_args()
    if o.command == "prepare":
        prepare(o.folder, o.recipe, o.overrides)
    elif o.command == "steps":
        steps(o.folder, o.seconds, o.heads.split(","))
    else:
        train(o.folder)


if __name__ == "__main__":
    main()
