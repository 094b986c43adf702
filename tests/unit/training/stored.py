"""Samples of a tiny target in a feature store, for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from draftsmith.data.features import FeatureStore, PassOptions, store
from draftsmith.data.samples import Sample
from draftsmith.decoding.engine import Engine
from draftsmith.target.protocol import FeatureSpec
from tests.tiny import prompts, tiny_target

LAYERS = (2, 4, 5)
WANT = FeatureSpec(LAYERS, True)


def stored(samples: Sequence[Sample], folder: Path, batch_positions: int = 400, kind: str = "llama") -> FeatureStore:
    """A store of the samples' features."""
    place = store(tiny_target(kind), samples, WANT, PassOptions(batch_positions=batch_positions), folder / "store", {})
    return FeatureStore(place)


def random_samples(count: int, seed: int = 0, longest: int = 30) -> list[Sample]:
    """Texts of random tokens with random answer masks of several turns, some without any answer."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for number in range(count):
        length = int(torch.randint(2, longest, (1,), generator=draw))
        ids = torch.randint(8, 96, (length,), generator=draw).tolist()
        # runs of about four positions, every other of them an answer's
        turns = (torch.rand(length, generator=draw) < 0.25).cumsum(0) % 2
        out.append(Sample(f"s{number}", ids, [bool(flag) for flag in turns.tolist()], True))
    return out


def answered(count: int, new_tokens: int, seed: int = 0) -> list[Sample]:
    """Prompts with the answers that the target writes to them, greedily."""
    asked = prompts(count, seed=seed)
    written = Engine(tiny_target()).generate(asked, None, new_tokens)
    return [
        Sample(
            f"s{number}",
            [*prompt, *g.token_ids],
            [False] * len(prompt) + [True] * len(g.token_ids),
            g.finish == "stop",
        )
        for number, (prompt, g) in enumerate(zip(asked, written, strict=True))
    ]
