"""A run folder with everything a report shows, made up but plausible: written texts, drawn rounds, drawn flatness."""

from __future__ import annotations

import random
import re
from pathlib import Path

from draftsmith.decoding.trace import Generation, Round
from draftsmith.evaluation.summary import Lossless, StageTime, Summary, summarise, write_summary
from draftsmith.foundation import artefacts

TEXTS = {
    "word-problems": [
        (
            "A baker makes 14 trays of rolls with 6 rolls on each tray. She sells 59 rolls. How many are left?",
            "To find how many rolls are left, we first work out how many were baked.\n\n14 trays x 6 rolls "
            "= 84 rolls\n\n"
            "Then we subtract the rolls that were sold:\n\n84 - 59 = 25 rolls\n\nSo 25 rolls are left.",
        ),
        (
            "Tom reads 12 pages on each of 5 days. His book has 96 pages. How many pages does he still have to read?",
            "Tom reads 12 pages a day for 5 days:\n\n12 x 5 = 60 pages\n\nThe book has 96 pages, so he "
            "still has to read:\n\n"
            "96 - 60 = 36 pages\n\nTherefore, Tom still has to read 36 pages.",
        ),
        (
            "A tank holds 240 litres. It loses 7 litres an hour. How much is left after 9 hours?",
            "The tank loses 7 litres every hour. After 9 hours, it has lost:\n\n7 x 9 = 63 litres\n\nThe "
            "amount left is:\n\n"
            "240 - 63 = 177 litres\n\nThere are 177 litres left in the tank after 9 hours.",
        ),
    ],
    "chat": [
        (
            "My neighbour's dog barks all night. What can I do without starting a fight?",
            "I'm sorry to hear that. Here are a few things you could try:\n\n1. Talk to your neighbour "
            "calmly and in person. They "
            "may not know that the dog barks when they are away.\n2. Suggest a solution, such as a walk "
            "before bedtime.\n"
            "3. Keep a log of the times at which the dog barks.",
        ),
        (
            "Suggest a name for a small café that sells only soup.",
            'Here\'s a name that is warm and easy to remember: "The Ladle & Spoon". It says at once what you sell, it '
            "sounds cosy, and it looks good on a sign. If you'd like something more playful, "
            'how about "Souper Corner"?',
        ),
        (
            "Why do leaves change colour in autumn? Explain <b>briefly</b> & simply.",
            "Leaves are green because of chlorophyll, which helps them turn sunlight into food. In autumn, "
            "days grow shorter and "
            "trees stop making chlorophyll. As the green fades, yellow and orange pigments that were there "
            "all along begin to show.",
        ),
    ],
}
PIECE = re.compile(r"\n| ?[A-Za-z]{1,7}| ?[0-9]| ?[^A-Za-z0-9\s]|\s")
STAGES = {"regenerate": 212, "score": 148, "select": 3, "features": 71, "train": 338, "bench": 126, "export": 9}


def write_synthetic_run(folder: Path, *, prompts: int = 8, drafters: int = 1, seed: int = 0) -> Path:
    """Writes summary.json, bench.jsonl, training.jsonl, selection.json, scores.jsonl, "
    "provenance.json and recipe.yaml."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = " + ".join(["eagle3", "eagle3-chat"][:drafters])
    rows, results = [], []
    for temperature in (0.0, 1.0):
        for name, texts in TEXTS.items():
            ease = (0.74 if name == "word-problems" else 0.6) - 0.05 * temperature
            plain, speculative = [], []
            for i in range(prompts):
                prompt, text = texts[i % len(texts)]
                pieces = PIECE.findall(text)
                shared = {
                    "set": name,
                    "id": f"{name}-{i:03d}",
                    "prompt": prompt,
                    "temperature": temperature,
                    "pieces": pieces,
                }
                answer, origins, depths = speculative_answer(rng, i, len(pieces), ease, drafters)
                total = 96.0 + (len(pieces) - 1) * 18.0 * rng.uniform(0.97, 1.03)
                usual = Generation(i, answer.token_ids, answer.finish, [], 96.0, total)
                plain.append(usual)
                speculative.append(answer)
                rows.append(shared | {"mode": "plain", "generation": usual.to_row(), "origins": [], "depths": []})
                drafted = {"generation": answer.to_row(), "origins": origins, "depths": depths}
                rows.append(shared | {"mode": "speculative"} | drafted)
            lossless = Lossless(checked=prompts, equal=prompts - (name == "chat"), near_ties=int(name == "chat"))
            results.append(summarise(name, temperature, names, plain, speculative, lossless, node_budget=15))
    artefacts.write_jsonl(folder / "bench.jsonl", rows)
    stages = [StageTime(name=name, seconds=seconds) for name, seconds in STAGES.items()]
    write_summary(folder / "summary.json", Summary(results=results, stages=stages))
    artefacts.write_jsonl(folder / "training.jsonl", training(rng))
    selection(rng, folder)
    provenance = {
        "command": "draftsmith run recipes/quickstart.yaml --out runs/quickstart",
        "time": "2026-01-15T09:30:00+00:00",
        "git": "3f2a91c",
        "python": "3.11.13",
        "versions": {"draftsmith": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "processor": "a made-up processor",
        "threads": 2,
        "devices": [],
        "facts": {
            "Target": "SmolLM2-135M-Instruct (GGUF, de-quantised), bfloat16",
            "Drafter": "EAGLE-3 head, layers 2, 15, 27, draft vocabulary 4,096",
        },
    }
    artefacts.write_json(folder / "provenance.json", provenance)
    (folder / "recipe.yaml").write_text("target: smollm2\ntrain:\n  seconds: 330\nselect: {keep: 0.5}\n")
    return folder


def speculative_answer(
    rng: random.Random, request: int, length: int, ease: float, drafters: int
) -> tuple[Generation, list[int], list[int]]:
    """An answer of `length` tokens whose drafts are accepted with probability `ease`, a little less at each depth."""
    rounds: list[Round] = []
    origins, depths = [-1], [0]
    written, context = 1, 60 + 31 * request
    while written < length:
        accepted, reached = 0, 0
        while accepted < 4:
            reached = accepted + 1
            if rng.random() > ease - 0.04 * accepted:
                break
            accepted += 1
        owners = tuple(rng.randrange(drafters) for _ in range(accepted))
        kept = min(accepted + 1, length - written)
        draft, verify, rest = rng.gauss(4.1, 0.3), rng.gauss(21.5, 0.6), rng.gauss(1.2, 0.1)
        rounds.append(
            Round(request, 15, reached, accepted, accepted + 1, kept, owners, context + written, draft, verify, rest)
        )
        origins += [*owners, -1][:kept]
        depths += [*range(1, accepted + 1), 0][:kept]
        written += kept
    total = 101.0 + sum(r.draft_ms + r.verify_ms + r.rest_ms for r in rounds)
    return Generation(request, list(range(length)), "stop", rounds, 101.0, total), origins, depths


def training(rng: random.Random) -> list[dict[str, object]]:
    """Four unrolled steps whose loss falls, and six replays on dev."""
    rows: list[dict[str, object]] = []
    for step in range(1, 241):
        losses = [2.1 + 0.25 * k + 3.4 * 0.985**step + rng.gauss(0, 0.12) for k in range(4)]
        speed = rng.gauss(690, 15)
        row = {"step": step, "loss": losses[0], "loss_by_step": losses, "lr": 1e-3, "seconds": 1.4}
        rows.append(row | {"positions_per_second": speed})
        if step % 40 == 0:
            rows.append({"step": step, "dev_acceptance_length": 2.25 - 0.9 * 0.982**step, "seconds": 3.0})
    return rows


def selection(rng: random.Random, folder: Path, samples: int = 400) -> None:
    """Samples with a flatness for each token; the flatter half is kept."""
    scored, everything = [], [pair for texts in TEXTS.values() for pair in texts]
    for i in range(samples):
        pieces = PIECE.findall(everything[i % len(everything)][1])
        level = rng.gauss(-4.1, 0.25)
        flatness = [min(0.6, 1 / 49152**0.5 * (1 + rng.expovariate(1) ** 3 * 2.718 ** (level + 3.2))) for _ in pieces]
        scored.append({"id": f"train-{i:04d}", "flatness": flatness, "pieces": pieces})
    means = {row["id"]: sum(row["flatness"]) / len(row["flatness"]) for row in scored}
    border = sorted(means.values())[samples // 2]
    rows = [
        {"id": row["id"], "score": means[row["id"]], "kept": means[row["id"]] >= border, "tokens": len(row["flatness"])}
        for row in scored
    ]
    artefacts.write_json(folder / "selection.json", {"method": "flatness", "keep": 0.5, "rows": rows})
    artefacts.write_jsonl(folder / "scores.jsonl", scored)
