"""What a killed run goes on from: weights, moments, averages, the best weights so far, and what decides the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.foundation import artefacts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        best: largest acceptance length on dev so far; best_step: where; best_weights: by parameter name.
        since_best: evaluations since then.
        thresholds: running thresholds of the token weights, by unrolled step.
        source: what a source of samples that change goes on from (`Changing`).
        cost: what was spent so far (`Account`).
    """

    step: int = 0
    best: float = 0.0
    best_step: int = 0
    since_best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[int, float] = field(default_factory=dict)
    source: dict[str, Tensor] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor] | None,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write a run's state as one file, atomically."""
    tensors = {f"source.{name}": tensor for name, tensor in progress.source.items()}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter
        if progress.best_weights:
            tensors[f"best.{name}"] = progress.best_weights[name]
        for key in MOMENTS:
            # a parameter that never had a gradient has no moments
            if key in (moments := optimiser.state.get(parameter, {})):
                tensors[f"{key}.{name}"] = moments[key]
        if average is not None:
            tensors[f"average.{name}"] = average[name]
    metadata = {
        "step": str(progress.step),
        "best_step": str(progress.best_step),
        "best": repr(progress.best),
        "since_best": str(progress.since_best),
        "thresholds": json.dumps(progress.thresholds),
        "cost": json.dumps(progress.cost),
    }
    artefacts.save_tensors(path, tensors, metadata)


@torch.no_grad()
def restore(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor] | None,
    optimiser: torch.optim.Optimizer,
) -> Progress:
    """Read a state into parameters, averages and optimiser; a fresh run's progress where there is none."""
    if not path.is_file():
        return Progress()
    metadata = artefacts.load_metadata(path)
    tensors = artefacts.load_tensors(path)
    progress = Progress(
        int(metadata["step"]),
        float(metadata["best"]),
        int(metadata["best_step"]),
        int(metadata["since_best"]),
        thresholds={int(step): value for step, value in json.loads(metadata["thresholds"]).items()},
        source={name.removeprefix("source."): t for name, t in tensors.items() if name.startswith("source.")},
        cost=json.loads(metadata["cost"]),
    )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        if f"best.{name}" in tensors:
            progress.best_weights[name] = tensors[f"best.{name}"].to(parameter.device)
        if average is not None:
            average[name].copy_(tensors[f"average.{name}"])
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
            optimiser.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    return progress
