"""Acceptance length by replay: walk stored answers round by round with a drafter, without a pass of the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.data.features import StoredSample
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.hedging import carries
from draftsmith.decoding.trace import Generation
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.replay import ReplayTarget, StoredAnswer


def stored_answer(sample: StoredSample) -> StoredAnswer:
    """A store's sample as an answer to replay: the prompt ends where its last run of answer tokens begins."""
    mask = sample.mask.tolist()
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return StoredAnswer(
        sample.ids[:end].tolist(), start, {k: v[:end] for k, v in sample.hidden.items()}, sample.complete
    )


def replay(
    composition: Composition,
    spec: TargetSpec,
    answers: Sequence[StoredAnswer],
    batch: int = 64,
    device: torch.device | None = None,
) -> list[Generation]:
    """The rounds in which the engine would write these answers: in exact arithmetic those of decoding them anew.

    A composition that learns from one request for the next (`hedging.carries`) gets them one by one in their order.
    A complete answer is taken to have had room behind its end, so the last trees are as deep as any.
    `device` is where the drafters are, the CPU by default.
    """
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i].ids))
    if carries(composition):
        order, batch = list(range(len(answers))), 1
    found: dict[int, Generation] = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        chosen = [answers[i] for i in group]
        target = ReplayTarget(spec, chosen, device)
        prompts = [list(a.ids[: a.prompt_length]) for a in chosen]
        behind = [composition.budget if a.complete and a.ids[-1] in spec.eos_ids else 0 for a in chosen]
        limits = [len(a.ids) - a.prompt_length + more for a, more in zip(chosen, behind, strict=True)]
        for i, generation in zip(group, Engine(target, composition).generate(prompts, None, limits), strict=True):
            found[i] = generation
    return [found[i] for i in range(len(answers))]
