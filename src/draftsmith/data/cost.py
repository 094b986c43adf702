"""What the statistics cost beside the target's pass, on this machine: its body, its output layer, the statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.features import plan
from draftsmith.data.samples import Sample
from draftsmith.numerics.distributions import BLOCK_BYTES, rows_that_fit, statistics
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec

BATCHES = 4


@dataclass(frozen=True)
class PassCost:
    """Seconds of a position, the least of some batches.

    Attributes:
        body: the pass to the last hidden state.
        head: its logits, in blocks: body and head are the pass that computes the logits anyway.
        scores: every statistic of them beside that.
        expected: summing up how often the target would write each token (for draft vocabularies), beside those.
    """

    body: float
    head: float
    scores: float
    expected: float

    @property
    def plain(self) -> float:
        """The pass that computes the logits and looks at none."""
        return self.body + self.head

    @property
    def head_share(self) -> float:
        """The output layer's part of that pass."""
        return self.head / self.plain

    @property
    def overhead(self) -> float:
        """What the statistics add to it: 0.1 is 10 %."""
        return self.scores / self.plain


def measure(
    target: HFTarget, samples: Sequence[Sample], batch_positions: int, clock: Callable[[], float] | None = None
) -> PassCost:
    """Time the parts of the pass on some batches of the samples, from the middle of their lengths.

    Each batch is read, projected, scored and counted in turn, so that a slow minute meets all parts alike.

    Args:
        clock: seconds; default: the process's own where it has one thread, which a busy machine changes least, else the
            wall's.
    """
    if clock is None:
        alone = target.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
    batches = plan([len(s.ids) for s in samples], batch_positions)
    middle = max(0, (len(batches) - BATCHES) // 2)
    chosen = batches[middle : middle + BATCHES]
    parts: list[tuple[float, float, float, float]] = []
    for batch in [chosen[0], *chosen]:  # the first one warms up
        parts.append(_parts(target, [samples[i] for i in batch], clock))
    body, head, scored, counted = (min(column) for column in zip(*parts[1:], strict=True))
    return PassCost(body, head, max(0.0, scored - head), max(0.0, counted - scored))


@torch.inference_mode()
def _parts(
    target: HFTarget, samples: Sequence[Sample], clock: Callable[[], float]
) -> tuple[float, float, float, float]:
    """Seconds of a position: body; logits in blocks; logits and statistics; these and the expected counts."""
    lengths = [len(s.ids) for s in samples]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.ids) for s in samples], batch_first=True)
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1))[valid].to(target.device)
    weights = torch.ones(sum(lengths), device=target.device)
    sums = torch.zeros(target.spec.vocab_size, device=target.device)

    def timed(work: Callable[[], object]) -> float:
        _synchronise(target)
        started = clock()
        work()
        _synchronise(target)
        return (clock() - started) / sum(lengths)

    found: list[Tensor] = []
    body = timed(lambda: found.append(target.read(ids, lengths, FeatureSpec())["final"]))
    hidden = found[0][valid.to(target.device)]
    rows = rows_that_fit(BLOCK_BYTES, target.spec.vocab_size)

    def project() -> None:
        for start in range(0, len(hidden), rows):
            target.project(hidden[start : start + rows])

    head = timed(project)
    scored = timed(lambda: statistics(hidden, target.project, following))
    counted = timed(lambda: statistics(hidden, target.project, following, expected=(weights, sums)))
    return body, head, scored, counted


def _synchronise(target: HFTarget) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
