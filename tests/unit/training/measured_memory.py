"""Trains a head of some shape for three steps and prints its peak of memory beside the predicted: a process of its own.

python -m tests.unit.training.measured_memory HIDDEN DRAFT_VOCABULARY ROW_LENGTH PRECISION CHECKPOINT_STEPS
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from draftsmith.data.features import StoredSample
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation.options import validate
from draftsmith.numerics import losses
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.dev import Dev
from draftsmith.training.memory import training_memory
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.options import TrainOptions
from draftsmith.training.trainer import train
from tests.tiny import NoTokenizer


class Made:
    """Random samples, three quarters of each an answer."""

    def __init__(self, layers: Sequence[int], hidden: int, length: int, count: int) -> None:
        self.ids = [f"s{n}" for n in range(count)]
        self.lengths = [length] * count
        self._layers, self._hidden = layers, hidden

    def outline(self, name: str) -> StoredSample:
        return self.fetch([name], 0)[0]

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        length = self.lengths[0]
        mask = torch.arange(length) >= length // 4
        columns = {"log_z": torch.zeros(length), "log_norm": torch.zeros(length)}
        found = []
        for name in ids:
            states = {k: torch.randn(length, self._hidden).bfloat16() for k in self._layers}
            states["final"] = torch.randn(length, self._hidden).bfloat16()  # type: ignore[index]
            found.append(StoredSample(name, torch.randint(8, 99, (length,)), mask, True, dict(states), columns))
        return found


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main(hidden: int, draft_vocab: int, row_length: int, precision: str, checkpoint_steps: bool) -> None:
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=64,
        max_position_embeddings=2048,
        eos_token_id=7,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 7
    target = HFTarget(model, NoTokenizer(), "made")
    o = validate(
        TrainOptions,
        {
            "steps": 3,
            "evaluations": 1,
            "row_length": row_length,
            "precision": precision,
            "checkpoint_steps": checkpoint_steps,
        },
        "test",
    )
    vocab = VocabMap(torch.arange(draft_vocab), 8192)
    shape = eagle3_options(config, target.spec, draft_vocab)
    head = Eagle3(shape, vocab, target.embedding)
    source = Made(shape.auxiliary_layers, hidden, row_length // 2, 3 * o.batch_positions * 2 // row_length)
    dev = Dev(target.spec, [stored_answer(source.outline("s0"))], ChainGrowth(3))
    parts = (o.unroll_steps, o.step_decay, o.detach_steps, o.checkpoint_steps)
    objective = Eagle3Objective(head, target.output_rows(vocab.target_ids), losses.by_name(o.loss), *parts)
    parameters = sum(p.numel() for p in head.parameters())
    gc.collect()
    before = memory("VmRSS") - 4 * parameters
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, loading's, is forgotten
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        train(head, objective, source, source.ids, dev, o, place / "drafter", place / "log.jsonl", {})
    features = len(shape.auxiliary_layers) * hidden
    found = training_memory(shape, parameters, features, (o.unroll_steps, o.checkpoint_steps), o)
    measured = memory("VmHWM") - before
    sys.stdout.write(json.dumps({"measured": measured, "predicted": found.peak, "parts": vars(found)}) + "\n")


if __name__ == "__main__":
    size, vocabulary, length, precision, checkpointed = sys.argv[1:]
    main(int(size), int(vocabulary), int(length), precision, checkpointed == "yes")
