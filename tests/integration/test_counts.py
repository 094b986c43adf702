"""Acceptance lengths of fixed drafters on a fixed tiny target, against those in `counts.json`: counts, never seconds.

What makes drafts worse without making texts wrong (a growth that ranks badly, a map off by one, a state of the wrong
position) is seen here. After a change that is meant to change them: `python -m tests.integration.test_counts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import BestFirstGrowth, ChainGrowth, DynamicGrowth
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.evaluation import metrics
from draftsmith.evaluation.regressions import Comparison, compare
from draftsmith.evaluation.replayed import replay
from draftsmith.evaluation.statistics import ratio_interval
from draftsmith.evaluation.summary import Lossless, Result, Speedup
from draftsmith.foundation import artefacts
from draftsmith.target.replay import StoredAnswer
from draftsmith.target.vocabulary import VocabMap
from tests.integration.test_replay_equals_engine import KIND, answers, trained_head
from tests.tiny import VOCAB, OracleDrafter, tiny_target

STORED = Path(__file__).with_name("counts.json")
Numbers = dict[str, Any]


def stored_answers() -> list[StoredAnswer]:
    """The longest first, as `replay` takes them: the oracle knows texts by their row."""
    return sorted(answers("greedy")[2], key=lambda a: -len(a.ids))


def compositions(dial: float = 0.6) -> dict[str, Composition]:
    """Everybody who drafts here; the oracle's dial says how often it is right."""
    texts = [a.ids for a in stored_answers()]
    ngram = NgramDrafter(NgramOptions(guess=False), VocabMap.identity(VOCAB))
    head = trained_head("eagle3", "greedy")
    return {
        "oracle-chain": Single(OracleDrafter(texts, dial), ChainGrowth(3)),
        "oracle-tree": Single(OracleDrafter(texts, dial), DynamicGrowth(15, 4, 4)),
        "oracle-best-first": Single(OracleDrafter(texts, dial), BestFirstGrowth(15, 4, 4)),
        "ngram-tree": Single(ngram, DynamicGrowth(7, 3, 2)),
        "eagle3-chain": Single(head, ChainGrowth(3)),
        "eagle3-tree": Single(head, DynamicGrowth(15, 4, 4)),
    }


def measured(name: str, composition: Composition) -> Numbers:
    """Acceptance length with its interval over prompts, by replay of the stored answers."""
    generations = replay(composition, tiny_target(KIND).spec, stored_answers())
    counts = [metrics.count([g]) for g in generations]
    found = ratio_interval([c.committed for c in counts], [c.rounds for c in counts])
    rounds = sum(c.rounds for c in counts)
    return {"acceptance_length": found.estimate, "low": found.low, "high": found.high, "rounds": rounds}


def result(name: str, numbers: Mapping[str, Any]) -> Result:
    return Result(
        set="tiny",
        temperature=0.0,
        drafters=name,
        acceptance_length=numbers["acceptance_length"],
        acceptance_length_low=numbers["low"],
        acceptance_length_high=numbers["high"],
        acceptance_by_depth=[],
        # no time is measured: the comparison is told to leave speeds out
        round_cost=1.0,
        speedup=Speedup(estimate=1.0, low=None, high=None),
        plain_tokens_per_second=0.0,
        tokens_per_second=0.0,
        lossless=Lossless(checked=0, equal=0, near_ties=0),
    )


@cache
def now() -> dict[str, Numbers]:
    return {name: measured(name, composition) for name, composition in compositions().items()}


def compared(present: Mapping[str, Numbers], before: Mapping[str, Numbers]) -> Comparison:
    return compare([result(n, x) for n, x in present.items()], [result(n, x) for n, x in before.items()], speed=False)


def test_no_drafter_has_become_worse() -> None:
    stored = artefacts.read_json(STORED)
    found = compared(now(), stored)
    assert found.compared == len(compositions())
    assert found.missing == []
    assert found.worse == [], "drafts are accepted less than they were: if that is meant, write counts.json anew"
    assert min(numbers["rounds"] for numbers in stored.values()) > 100


def test_what_needs_no_training_is_the_same_to_the_token() -> None:
    stored = artefacts.read_json(STORED)
    for name, numbers in now().items():
        if not name.startswith("eagle3"):
            assert numbers["rounds"] == stored[name]["rounds"], name
            assert numbers["acceptance_length"] == pytest.approx(stored[name]["acceptance_length"]), name


def test_trees_beat_chains_and_everything_beats_nothing() -> None:
    found = {name: numbers["acceptance_length"] for name, numbers in now().items()}
    assert found["oracle-tree"] > found["oracle-chain"] > 1.5
    assert found["eagle3-tree"] > found["eagle3-chain"] > 1.5


def test_a_duller_drafter_is_flagged() -> None:
    duller = {n: measured(n, c) for n, c in compositions(dial=0.3).items() if n.startswith("oracle")}
    worse = compared(duller, artefacts.read_json(STORED)).worse
    assert [said.split(":")[0] for said in worse] == [f"tiny, T = 0, {name}" for name in duller]
    assert all("acceptance length fell from" in said for said in worse)


def test_a_map_off_by_one_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is wrong with it, only slower."""
    to_target = VocabMap.to_target

    def shifted(self: VocabMap, ids: torch.Tensor) -> torch.Tensor:
        return to_target(self, (ids + 1) % self.size)

    monkeypatch.setattr(VocabMap, "to_target", shifted)
    name = "eagle3-tree"
    (said,) = compared({name: measured(name, compositions()[name])}, artefacts.read_json(STORED)).worse
    assert name in said


if __name__ == "__main__":
    artefacts.write_json(STORED, now())
