"""`speculators train` on a CPU, run by speculators' own Python; what each step took goes into a file as JSON.

    python train_speculators.py OUT.json [arguments of `speculators train`]

speculators 0.9.0 takes for granted that there is an accelerator: three of its names are replaced, none of its sources.
A step has its positions that are no padding and its seconds, fetching included.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import speculators.train.cli as training
import speculators.train.distributed as distributed
import torch
from speculators.__main__ import app
from speculators.train.trainer import Trainer

STEPS: list[dict[str, float]] = []


class Steps(logging.Handler):
    """Keeps what the trainer measures of each step."""

    def emit(self, record: logging.LogRecord) -> None:
        profile = record.msg.get("profile") if isinstance(record.msg, dict) else None
        if profile:
            seconds = profile["step_ms"] / 1000
            loss = record.msg["train"].get("loss", float("nan"))
            STEPS.append({"seconds": seconds, "positions": profile["tokens_per_s"] * seconds, "loss": loss})


def on_cpu() -> None:
    """The trainer moves everything to its local rank, which is a number for it: here it is the CPU."""
    prepare, join = Trainer.__init__, training.maybe_setup_distributed

    def prepared(self: Any, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        self.device_type = "cpu"
        logging.getLogger("speculators.metrics").addHandler(Steps())

    def joined(*arguments: Any, **named: Any) -> None:
        join(*arguments, **named)
        distributed._local_rank = "cpu"

    distributed._local_rank = "cpu"
    torch.accelerator.synchronize = lambda *_, **__: None
    Trainer.__init__, training.maybe_setup_distributed = prepared, joined


if __name__ == "__main__":
    out = Path(sys.argv[1])
    on_cpu()
    sys.argv = ["speculators", "train", *sys.argv[2:]]
    try:
        app()
    finally:
        out.write_text(json.dumps(STEPS))
