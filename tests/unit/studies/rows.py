"""Hand-made rows."""

from __future__ import annotations

from typing import Any

from draftsmith.studies.rows import Row


def row(**changed: Any) -> Row:
    """A row of two answers; the counts of the whole follow from the answers'."""
    values: dict[str, Any] = {
        "study": "sfdd",
        "method": "random",
        "accounting": "equal-epochs",
        "keep": 0.5,
        "seed": 0,
        "domain": "math",
        "benchmark": "gsm8k",
        "temperature": 0.0,
        "growth": "dynamic",
        "node_budget": 15,
        "alpha": 0.5,
        "training_seconds": 10.0,
        "training_steps": 5,
        "training_positions": 1000,
        "training_cost": 4000,
        "committed": (10, 7),
        "rounds": (5, 4),
        **changed,
    }
    values.setdefault("prompts", tuple(f"p{i}" for i in range(len(values["rounds"]))))
    total = sum(values["rounds"])
    values.setdefault("target_passes", total)
    values.setdefault("acceptance_length", sum(values["committed"]) / total if total else None)
    return Row.model_validate(values)
