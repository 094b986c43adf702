"""What one softmax distribution looks like: flatness, entropy, top-1, margin, energy, likelihood; and how two overlap.

Every function takes logits `[..., V]` (or log-probabilities, where it says so) and drops the last axis. Everything is
computed in float32, or in float64 where the logits are float64, at temperature 1, whatever the input's type.
`statistics` computes all of it for many rows in one pass over bounded blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
"""What one float32 block of logits may take."""

# A tile of a block, and its exponentials, should stay in a core's second cache (2 MB): the pass over a block is
# memory-bound. Twice as large takes a quarter longer, half as large nothing less.
CPU_TILE_BYTES = 3 << 18

# Width of the chunks whose maxima stand for a row while the two largest logits are looked for.
CHUNK = 256

# Rows of the first block, from which the width of the vocabulary is learnt.
PROBE_ROWS = 32


def log_z(logits: Tensor) -> Tensor:
    """log Z = log Σ_v exp(z_v). `[..., V]` to `[...]`, in nats."""
    return torch.logsumexp(_wide(logits), dim=-1)


def log_norm(logits: Tensor) -> Tensor:
    """log ‖p‖₂ = ½·lse(2z) − lse(z) with p = softmax(z). `[..., V]` to `[...]`, between −½·log V and 0.

    Both sums are taken of exp(z − max z): the maximum would cancel, and at |z| = 400 it would take 5 digits with it.
    """
    exps = _exponentials(logits)
    return _norm(exps).log() - exps.sum(-1).log()


def flatness(logits: Tensor) -> Tensor:
    """cos(p, uniform) = 1 / (√V·‖p‖₂), p = softmax(logits). `[..., V]` to `[...]`, from 1/√V (one-hot) to 1 (uniform).

    It equals sqrt(exp(H₂)/V), H₂ the collision entropy. Source: SFDD (arXiv 2601.18902) eq. 6; the closed form is ours.
    """
    exps = _exponentials(logits)
    lowest = 1.0 / math.sqrt(logits.shape[-1])
    return (exps.sum(-1) / _norm(exps) * lowest).clamp(lowest, 1.0)


def flatness_from_log_norm(log_norms: Tensor, vocab_size: int) -> Tensor:
    """Flatness from a stored log ‖p‖₂ `[...]`; float32 in, float32 out, rounded once."""
    half = 0.5 * math.log(vocab_size)
    exact = torch.exp(-log_norms.double() - half).clamp(math.exp(-half), 1.0)
    return exact.to(_wide_dtype(log_norms.dtype))


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy −Σ p·log p in nats, p = softmax(logits). `[..., V]` to `[...]`, between 0 and log V."""
    terms: Tensor = torch.special.entr(torch.softmax(_wide(logits), dim=-1))
    return terms.sum(-1)


def top1(logits: Tensor) -> Tensor:
    """The largest probability. `[..., V]` to `[...]`, between 1/V and 1."""
    return 1.0 / _exponentials(logits).sum(-1)


def margin(logits: Tensor) -> Tensor:
    """The largest probability minus the second largest. `[..., V]` to `[...]`, between 0 and 1; 1 where V = 1."""
    if logits.shape[-1] == 1:
        return top1(logits)
    first, second = _wide(logits).topk(2, dim=-1).values.unbind(-1)
    return -torch.expm1(second - first) * top1(logits)


def energy(logits: Tensor) -> Tensor:
    """Free energy −log Z at temperature 1; high where the logits are small. `[..., V]` to `[...]`, in nats.

    Source: Liu et al. 2020, "Energy-based out-of-distribution detection" (arXiv 2010.03759) eq. 4.
    """
    return -log_z(logits)


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """−log p(token), p = softmax(logits). `[..., V]` and `[...]` int64 to `[...]`, in nats."""
    wide = _wide(logits)
    highest = wide.amax(-1)
    chosen = wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return _exponentials(logits).sum(-1).log() - (chosen - highest)


def overlap(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Σ_v min(p_v, q_v): the chance that a token drawn from q is accepted. Log-probabilities `[..., V]` to `[...]`.

    Over a reduced vocabulary, where p sums to less than 1, the mass outside counts as not overlapping.
    Source: Leviathan et al. 2023 (arXiv 2211.17192) corollary 3.6.
    """
    return torch.exp(torch.minimum(_wide(p_log), _wide(q_log))).sum(-1)


def total_variation(p_log: Tensor, q_log: Tensor) -> Tensor:
    """½·Σ_v |p_v − q_v| = 1 − overlap, p's mass outside a reduced vocabulary included. `[..., V]` to `[...]`."""
    return 1.0 - overlap(p_log, q_log)


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What the target's distribution looks like at each of N rows; row t is about the token that follows row t.

    Attributes:
        log_z: `[N]` float32, log Z in nats: with it exp(h·W_d − log Z) is p over any slice of the vocabulary.
        log_norm: `[N]` float32, log ‖p‖₂.
        entropy: `[N]` float32, nats.
        top1: `[N]` float32, the largest probability.
        margin: `[N]` float32, the largest minus the second largest probability.
        nll: `[N]` float32, −log p of the token that did follow, nats.
        argmax: `[N]` int64, the most probable token, the lowest id where several tie.
        vocab_size: V.
    """

    log_z: Tensor
    log_norm: Tensor
    entropy: Tensor
    top1: Tensor
    margin: Tensor
    nll: Tensor
    argmax: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return self.log_z.shape[0]

    @property
    def flatness(self) -> Tensor:
        """`[N]` float32: cos(p, uniform), see `flatness`."""
        return flatness_from_log_norm(self.log_norm, self.vocab_size)

    @property
    def energy(self) -> Tensor:
        """`[N]` float32: −log Z, see `energy`."""
        return -self.log_z

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, for a file; `TokenStatistics(**tensors, vocab_size=V)` is the way back."""
        return {name: getattr(self, name) for name in COLUMNS}

    def rows(self, index: Tensor | slice) -> TokenStatistics:
        """The rows that `index` (a slice, a bool mask `[N]` or int64 `[M]`) names."""
        return TokenStatistics(
            **{name: column[index] for name, column in self.tensors().items()}, vocab_size=self.vocab_size
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """Several statistics of one target, one after the other; ValueError where their vocabularies differ."""
        sizes = {part.vocab_size for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"statistics over different vocabularies cannot be joined: {sorted(sizes)}")
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        return cls(**columns, vocab_size=sizes.pop())


COLUMNS = ("log_z", "log_norm", "entropy", "top1", "margin", "nll", "argmax")
"""The stored columns of `TokenStatistics`: 28 bytes a token with `argmax` as int32."""


@torch.no_grad()
def statistics(
    hidden: Tensor,
    project: Callable[[Tensor], Tensor],
    next_tokens: Tensor,
    *,
    block_rows: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    expected: tuple[Tensor, Tensor] | None = None,
) -> TokenStatistics:
    """All statistics of the target's distribution at N rows, in one pass over bounded blocks; no gradient.

    Beside one block of `project`'s output, only a float32 tile and its exponentials are alive.

    Args:
        hidden: `[N, H]`, what `project` reads: the last hidden state.
        project: `[n, H]` to logits `[n, V]` of any float type: `lm_head`, with the target's soft-capping if it has one.
        next_tokens: `[N]` int64, the token that followed each row.
        block_rows: rows projected at once; by default what `block_bytes` holds.
        block_bytes: bytes of one block of logits, counted in float32.
        expected: (`[N]` weights, `[V]` float32 sum): the weighted rows' distributions are added to the sum, which then
            says how often the target is expected to write each token, those included that it happened not to write.

    Returns:
        `[N]` columns on `hidden`'s device.
    """
    n_rows = hidden.shape[0]
    if next_tokens.shape != (n_rows,):
        raise ValueError(f"next_tokens must be [{n_rows}], one for each row of hidden, not {list(next_tokens.shape)}")
    device = hidden.device
    columns = {name: torch.empty(n_rows, dtype=torch.float32, device=device) for name in COLUMNS[:-1]}
    columns["argmax"] = torch.empty(n_rows, dtype=torch.int64, device=device)
    # V is known once something was projected; a few rows are enough to say how many more fit into a block
    logits = project(hidden[: block_rows or PROBE_ROWS])
    vocab_size = logits.shape[-1]
    block_rows = block_rows or rows_that_fit(block_bytes, vocab_size)
    tile_rows = min(block_rows, rows_that_fit(CPU_TILE_BYTES, vocab_size)) if device.type == "cpu" else block_rows
    tiles = torch.empty(2, min(tile_rows, max(1, n_rows)), vocab_size, dtype=torch.float32, device=device)
    start = 0
    while True:
        rows = slice(start, start + logits.shape[0])
        weighted = None if expected is None else (expected[0][rows], expected[1])
        for name, column in _block_statistics(logits, next_tokens[rows], tiles, weighted).items():
            columns[name][rows] = column
        start = rows.stop
        if start >= n_rows:
            break
        del logits  # before the next block is there
        logits = project(hidden[start : start + block_rows])
    return TokenStatistics(**columns, vocab_size=vocab_size)


def rows_that_fit(n_bytes: int, width: int) -> int:
    """How many float32 rows of that width fit into `n_bytes`; at least one."""
    return max(1, n_bytes // (4 * width))


def _block_statistics(
    logits: Tensor, next_tokens: Tensor, tiles: Tensor, expected: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """The columns of one block `[n, V]`; `tiles` `[2, rows, V]` float32 is scratch.

    With e = exp(z − m): s1 = Σe, ‖e‖₂ and Σe·(z − m) give everything but the two largest logits. Those come from the
    maxima of chunks: the row's second largest is either in the chunk of the largest, or a chunk's maximum itself.
    """
    n_rows, vocab_size = logits.shape
    chunk = min(CHUNK, vocab_size)
    whole = vocab_size // chunk * chunk
    maxima = logits.new_empty((n_rows, -(-vocab_size // chunk)), dtype=torch.float32)
    highest, total, norm, moment = maxima.new_empty((4, n_rows))
    for start in range(0, n_rows, tiles.shape[1]):
        rows = slice(start, min(start + tiles.shape[1], n_rows))
        shifted, exps = tiles[:, : rows.stop - start]
        shifted.copy_(logits[rows])
        torch.amax(shifted[:, :whole].unflatten(-1, (-1, chunk)), dim=-1, out=maxima[rows, : whole // chunk])
        if whole < vocab_size:
            maxima[rows, -1] = shifted[:, whole:].amax(-1)
        torch.amax(maxima[rows], dim=-1, out=highest[rows])
        shifted.sub_(highest[rows].unsqueeze(-1))
        torch.exp(shifted, out=exps)
        torch.sum(exps, dim=-1, out=total[rows])
        torch.linalg.vector_norm(exps, dim=-1, out=norm[rows])
        torch.sum(shifted.mul_(exps), dim=-1, out=moment[rows])
        if expected is not None:
            weights, sums = expected
            sums.addmv_(exps.T, weights[rows] / total[rows])
    log_total = total.log()
    spread = log_total - moment / total
    excluded = spread.isnan()
    if bool(excluded.any()):  # a logit of −∞ (a token that a model rules out) made 0·∞ above
        spread[excluded] = entropy(logits[excluded])
    best, second = _two_largest(logits, maxima, chunk)
    chosen = logits.gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1).float()
    return {
        "log_z": highest + log_total,
        "log_norm": norm.log() - log_total,
        "entropy": spread,
        "top1": 1.0 / total,
        "margin": -torch.expm1(second - highest) / total,
        "nll": log_total - (chosen - highest),
        "argmax": best,
    }


def _two_largest(logits: Tensor, maxima: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The lowest index of each row's largest logit `[n]`, and the second largest logit `[n]` (−∞ where V = 1).

    `maxima` `[n, chunks]` holds each chunk's maximum and is written to.
    """
    vocab_size = logits.shape[-1]
    first = maxima.argmax(-1, keepdim=True)
    places = first * chunk + torch.arange(chunk, device=logits.device)
    values = logits.gather(-1, places.clamp_max(vocab_size - 1)).float()
    values.masked_fill_(places >= vocab_size, -torch.inf)
    inside = values.argmax(-1, keepdim=True)
    best = (first * chunk + inside).squeeze(-1)
    values.scatter_(-1, inside, -torch.inf)
    maxima.scatter_(-1, first, values.amax(-1, keepdim=True))
    return best, maxima.amax(-1)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values.dtype))


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norm


def _exponentials(logits: Tensor) -> Tensor:
    """exp(z − max z), `[..., V]`: never overflows, and its largest is 1."""
    wide = _wide(logits)
    return torch.exp(wide - wide.amax(-1, keepdim=True))
