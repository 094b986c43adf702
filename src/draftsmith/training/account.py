"""What a training run costs: passes and tokens of target, reference and draft, and seconds, interruptions included.

    field of `training.json`     what it counts
    cost.<who>.<what>.passes     forward passes
    cost.<who>.<what>.tokens     positions in them, padding left out
    cost.seconds                 wall-clock seconds of training steps, evaluations left out

`who` is `draft`, `reference` or `target`; `what` is `trained` (forward and backward), `judged` (the reference's losses,
or a second look with the same weights), `written` (on-policy answers, a token a pass and row) or `read`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Account:
    """Counts of one run; summed over ranks by whoever reports them."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, who: str, what: str, passes: int, tokens: int) -> None:
        """Count passes of so many tokens together."""
        known = self.counts.setdefault(who, {}).setdefault(what, {"passes": 0, "tokens": 0})
        known["passes"] += passes
        known["tokens"] += tokens

    def to_row(self) -> dict[str, Any]:
        """As it stands in `training.json`, under `cost`."""
        return {**self.counts, "seconds": round(self.seconds, 3)}

    def resume(self, row: Mapping[str, Any]) -> None:
        """Go on from `to_row`."""
        self.counts = {who: {what: dict(n) for what, n in kinds.items()} for who, kinds in row.items() if who != "seconds"}
        self.seconds = float(row.get("seconds", 0.0))
