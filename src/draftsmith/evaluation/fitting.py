"""What is fitted on replayed dev answers for compositions: temperatures of drafters, and routers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from draftsmith.decoding.building import Available, build
from draftsmith.decoding.calibration import Fitted, Surveyed, fitted
from draftsmith.decoding.composition import Single, children_of
from draftsmith.decoding.growth import Growth
from draftsmith.decoding.learned import FEATURES, Survey, SurveyRule
from draftsmith.decoding.learned import fitted as regressed
from draftsmith.decoding.routing import Route
from draftsmith.drafters.base import Drafter
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.replay import StoredAnswer


def temperatures(
    drafter: Drafter,
    growth: Growth,
    spec: TargetSpec,
    answers: Sequence[StoredAnswer],
    depth: int = 4,
    device: torch.device | None = None,
) -> list[Fitted]:
    """A drafter's temperatures by depth, from the rounds in which it alone would write these answers."""
    survey = Surveyed(drafter, growth, depth)
    replay(survey, spec, answers, device=device)
    return fitted(survey.tally)


def trie_lengths(
    members: Mapping[str, Available],
    growth: Growth,
    spec: TargetSpec,
    answers: Sequence[StoredAnswer],
    depth: int = 4,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Acceptance length of the members' trie without and with temperatures that were fitted on the other answers.

    Every second answer fits, the others are replayed, then the other way round: no answer judges what it fitted. The
    node budget is one member's.
    """
    names = ",".join(members)
    plain, warm = metrics.Counts(), metrics.Counts()
    for fold in range(2):
        fitting = [a for i, a in enumerate(answers) if i % 2 == fold]
        judging = [a for i, a in enumerate(answers) if i % 2 != fold]
        if not fitting or not judging:
            return math.nan, math.nan
        tempered = {}
        for name, member in members.items():
            found = temperatures(member.drafter, member.growth or growth, spec, fitting, depth, device)
            tempered[name] = Available(member.drafter, member.growth, tuple(f.temperature for f in found) or (1.0,))
        plain += metrics.count(replay(build(f"merge:trie({names})", members, growth), spec, judging, device=device))
        warm += metrics.count(
            replay(build(f"merge:trie({names},calibrated=true)", tempered, growth), spec, judging, device=device)
        )
    return plain.acceptance_length, warm.acceptance_length


def router(
    members: Mapping[str, Available],
    growth: Growth,
    round_ms: Mapping[str, float],
    spec: TargetSpec,
    answers: Sequence[StoredAnswer],
    device: torch.device | None = None,
) -> dict[str, object]:
    """The artefact that `route:learned` reads: each member's weights, from its own rounds over these answers.

    Args:
        round_ms: milliseconds of a round of each member, drafting and verification.
    """
    entries: dict[str, object] = {}
    for name, member in members.items():
        single = Single(member.drafter, member.growth or growth, name)
        children = children_of(single)
        survey = Survey()
        replay(Route((single,), SurveyRule((children,), survey)), spec, answers, device=device)
        entries[name] = {
            "weights": regressed(survey),
            "round_ms": round_ms[name],
            "children": children,
            "rounds": len(survey.seen),
            "mean_accepted": sum(survey.accepted) / len(survey.accepted),
        }
    return {"format": 1, "kind": "router", "features": list(FEATURES), "members": entries}
