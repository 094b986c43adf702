"""Traces survive jsonl, and contradictory counts are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from draftsmith.decoding.trace import Generation, Round
from draftsmith.foundation.errors import UserError

ROUND = Round(
    request=3,
    nodes=7,
    reached=3,
    accepted=2,
    committed=3,
    kept=1,
    owners=(1, 0),
    context=40,
    draft_ms=1.5,
    verify_ms=6.25,
    rest_ms=0.5,
)


def test_generation_survives_json() -> None:
    generation = Generation(
        request=3, token_ids=[5, 6, 2], finish="stop", rounds=[ROUND, ROUND], prefill_ms=20.5, total_ms=44.0
    )
    again = Generation.from_row(json.loads(json.dumps(generation.to_row())))
    assert again == generation
    assert again.rounds[0].owners == (1, 0)
    assert isinstance(again.rounds[0].owners, tuple)


@pytest.mark.parametrize(
    "change",
    [
        {"reached": 4},
        {"reached": 1},
        {"committed": 2},
        {"kept": 4},
        {"owners": (0,)},
        {"nodes": 2},
        {"drafted": (3, 3)},
        {"accepted": -1, "committed": 0, "reached": 0, "owners": (), "kept": 0},
    ],
)
def test_contradictions_are_refused(change: dict[str, object]) -> None:
    row = ROUND.to_row() | change
    with pytest.raises(ValueError):
        Round(**(row | {"owners": tuple(row["owners"])}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="round"):
        Round.from_row(row)


def test_missing_fields_and_unknown_endings_are_named() -> None:
    row = Generation(request=0, token_ids=[1], finish="length").to_row()
    with pytest.raises(UserError, match="'finish'.*'eos'"):
        Generation.from_row(row | {"finish": "eos"})
    del row["prefill_ms"]
    with pytest.raises(UserError, match="'prefill_ms'"):
        Generation.from_row(row)
    without = ROUND.to_row()
    del without["kept"]
    with pytest.raises(UserError, match="'kept'"):
        Round.from_row(without)


def test_nodes_by_drafter_are_kept_and_may_be_missing() -> None:
    told = replace(ROUND, drafted=(5, 2))
    assert Round.from_row(json.loads(json.dumps(told.to_row()))) == told
    row = told.to_row()
    del row["drafted"]
    assert Round.from_row(row) == ROUND
