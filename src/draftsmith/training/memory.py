"""How much memory training a head will take, from its shape alone: what a step keeps for its backward pass is counted.

Counted in bytes per draft (a start in a row) and unrolled step, c bytes a number in the matrix products' format:

    norms         4 of H, each its input in float32, quotient and result
    attention     q, turned; k, v of one row, turned and repeated over the query heads; its result
    scores        heads · L: softmax in float32 and in c bytes (the first step's attention keeps none)
    MLP           gate, its activation, up, their product: 4 · I · c
    logits        Vd · c, where a step's rows fit into one block: the gradient that is kept in their place
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from draftsmith.drafters.head import HeadOptions
from draftsmith.numerics.distributions import BLOCK_BYTES, rows_that_fit
from draftsmith.training.options import TrainOptions

SLACK = 1.07  # what the allocator can't use, and compiled kernels: measured
STARTS = 0.75  # share of positions from which drafts start: those of answers


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, by what they are for.

    Attributes:
        weights: parameters, averages and the best so far; moments: AdamW's; gradients: of the weights.
        step: what a step keeps for its backward pass, and its batch.
        saving: copies of all state while it is written.
    """

    weights: int
    moments: int
    gradients: int
    step: int
    saving: int

    @property
    def peak(self) -> int:
        """Of training, beside the process with its target."""
        return self.weights + self.moments + max(self.gradients + self.step, self.saving)


def training_memory(
    head: HeadOptions,
    parameters: int,
    features: int,
    unrolled: tuple[int, bool],
    options: TrainOptions,
    ranks: int = 1,
    item_bytes: int = 2,
) -> TrainingMemory:
    """What training a head of so many `parameters` takes on each of `ranks` processes.

    Args:
        unrolled: how many steps are unrolled, and whether each is computed again in the backward pass.
        features: numbers of the target's state that the head reads at a position, the teacher's not counted.
        item_bytes: of a stored number.
    """
    o = options
    steps, again = unrolled
    width = 2 if o.precision == "bfloat16" else 4
    rows = math.ceil(max(1, o.batch_positions // o.row_length) / (ranks * o.accumulation))
    positions = rows * o.row_length
    starts = STARTS * positions
    hidden, queries = head.hidden_size, head.num_attention_heads * head.head_dim
    keys = head.num_key_value_heads * head.head_dim
    # in float32 nothing is kept twice, once for either format
    twice = width if width == 2 else 0
    norm = hidden * (2 * width + 2 * twice)
    scores = head.num_attention_heads * o.row_length
    block = rows_that_fit(BLOCK_BYTES, head.draft_vocab_size)
    kept_logits = starts * head.draft_vocab_size * width if starts <= block else 0.0
    later = starts * (4 * norm + width * (8 * hidden + 8 * queries + 3 * keys + 4 * head.intermediate_size))
    attention = starts * scores * (4 + twice)
    first = later + positions * (2 * norm + width * (features + 4 * hidden + 6 * keys))
    if again:
        kept = steps * starts * width * (2 * hidden + 2 * queries)
        running = first + later + 2 * attention + kept
    else:
        running = first + (steps - 1) * (later + attention)
    shared = positions * 2 * queries * width + starts * o.row_length * 6
    working = starts * scores * 8 + min(starts, block) * head.draft_vocab_size * (4 + width)
    batch = positions * ((features + hidden) * item_bytes * 2 + 64)
    copies = 4 * (2 + bool(o.ema)) * parameters + (width * parameters if width == 2 else 0)
    return TrainingMemory(
        weights=copies,
        moments=8 * parameters,
        gradients=4 * parameters,
        step=int(SLACK * (running + shared + working + kept_logits * steps + batch)),
        saving=parameters * (4 + 8 + 4 + 4 * bool(o.ema)),
    )
