"""Where a run's metrics go beside its JSON lines: TensorBoard, trackio, Weights & Biases, each only if named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from draftsmith.foundation import ranks
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options

Name = Literal["tensorboard", "trackio", "wandb"]
Log = Callable[[Mapping[str, object]], None]

_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


class TrackingOptions(Options):
    """Who is told the metrics while training goes on; changes no result. The JSON lines are always written."""

    trackers: tuple[Name, ...] = Field(default=(), description="tensorboard, trackio, wandb: installed by you")
    project: str = Field(default="draftsmith", description="project's name (trackio, wandb)")
    name: str | None = Field(default=None, description="of the run; default: its folder's")


@contextmanager
def tracking(options: TrackingOptions, folder: Path) -> Iterator[Log]:
    """A function that takes the log's rows (a `step`, and numbers) and tells every tracker; rank 0 only.

    Args:
        folder: of the run; TensorBoard writes into `folder/tensorboard`.

    Raises:
        UserError: a tracker's package is not installed.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        for name in options.trackers if ranks.rank() == 0 else ():
            logs.append(_opened(name, options, folder, stack))

        def log(row: Mapping[str, object]) -> None:
            for tell in logs:
                tell(row)

        yield log


def _opened(tracker: Name, options: TrackingOptions, folder: Path, stack: ExitStack) -> Log:
    try:
        package: Any = importlib.import_module(_PACKAGES[tracker])
    except ImportError:
        raise UserError(
            f"tracking.trackers names {tracker}, which is not installed: pip install {_PACKAGES[tracker]}, or leave it "
            "out (the metrics are in training.jsonl)"
        ) from None
    if tracker == "tensorboard":
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        stack.callback(writer.close)

        def add(row: Mapping[str, object]) -> None:
            step, numbers = split(row)
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return add
    run = package.init(project=options.project, name=options.name or folder.name)
    stack.callback(package.finish)

    def tell(row: Mapping[str, object]) -> None:
        step, numbers = split(row)
        run.log(numbers, step=step)

    return tell


def split(row: Mapping[str, object]) -> tuple[int, dict[str, float]]:
    """A log row's step and its numbers; a list gives one number an entry (`loss_by_step/0`, …)."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else None
        for key, number in [(name, value)] if values is None else [(f"{name}/{i}", v) for i, v in enumerate(values)]:
            if isinstance(number, int | float) and key != "step":
                numbers[key] = float(number)
    return int(str(row["step"])), numbers
