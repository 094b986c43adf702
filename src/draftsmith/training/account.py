"""What a training run costs: passes and tokens of target, reference and draft, and seconds, interruptions included.

    training.json  cost.<who>.<what>.passes   forward passes
                   cost.<who>.<what>.tokens   positions in them, padding left out
                   cost.before.<what for>     the same for what was done for its sake before (a reference)
    measured.json  seconds                    wall-clock seconds of training steps, evaluations left out
                   before.<what for>          likewise

`who` is `draft`, `reference` or `target`; `what` is `trained` (forward and backward), `judged` (the reference's losses,
or a second look with the same weights), `written` (on-policy answers, a token a pass and row) or `read`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from draftsmith.foundation import ranks

Who = Literal["draft", "reference", "target"]
What = Literal["trained", "judged", "written", "read"]
WHO, WHAT, UNITS = get_args(Who), get_args(What), ("passes", "tokens")


@dataclass
class Account:
    """One run's, on one rank."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, who: Who, what: What, passes: int, tokens: int) -> None:
        """Count passes of so many tokens together."""
        known = self.counts.setdefault(who, {}).setdefault(what, dict.fromkeys(UNITS, 0))
        known["passes"] += passes
        known["tokens"] += tokens

    def to_row(self) -> dict[str, Any]:
        """All of it, for a checkpoint; `resume` goes on from it."""
        return {**self.counts, "seconds": self.seconds}

    def over_ranks(self) -> dict[str, dict[str, dict[str, int]]]:
        """The counts of all ranks together, as they stand in `training.json` under `cost`."""
        cells = [(who, what, unit) for who in WHO for what in WHAT for unit in UNITS]
        own = [float(self.counts.get(who, {}).get(what, {}).get(unit, 0)) for who, what, unit in cells]
        whole: dict[str, dict[str, dict[str, int]]] = {}
        for (who, what, unit), count in zip(cells, ranks.sums(own), strict=True):
            if count:
                whole.setdefault(who, {}).setdefault(what, dict.fromkeys(UNITS, 0))[unit] = int(count)
        return whole

    def resume(self, row: Mapping[str, Any]) -> None:
        """Go on from `to_row`; from nothing where it is empty."""
        self.counts = {who: {what: dict(n) for what, n in row[who].items()} for who in WHO if who in row}
        self.seconds = float(row.get("seconds", 0.0))


@dataclass(frozen=True)
class Before:
    """What was spent for the sake of a training before it, by what for.

    Attributes:
        counts: as `Account.over_ranks`; seconds: wall-clock.
    """

    counts: Mapping[str, object] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
