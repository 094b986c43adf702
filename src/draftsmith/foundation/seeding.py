"""Keyed randomness: a draw depends on names (seed, request, position, purpose), never on what was drawn before.

So a batch equals each request alone, a resumed stage equals an uninterrupted one, and speculative decoding draws the
very numbers that plain decoding draws at the same place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 16), as signed 64-bit
# numbers: torch has no unsigned multiplication, but wrapping signed multiplication and addition give the same bits.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
POSITION_GAMMA = 0xD1342543DE82EF95 - (
    1 << 64
)  # another odd constant, so that positions and counters never walk in step


def key(*parts: int | str) -> int:
    """A 63-bit number from names and numbers; the same on every machine and in every run (blake2b).

    `key("a", "b")` differs from `key("ab")`, and `key(1)` from `key("1")`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else str(int(part)).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(encoded)}:".encode() + encoded)
    return int.from_bytes(digest.digest(), "big") >> 1


def uniform(keys: Tensor, n: int) -> Tensor:
    """`n` uniform numbers for each key, from the key and a counter alone: no generator state, the same on any device.

    Args:
        keys: `[...]` int64.
        n: draws per key.

    Returns:
        `[..., n]` float64, strictly between 0 and 1 (52 random bits).
    """
    counters = torch.arange(1, n + 1, dtype=torch.int64, device=keys.device).mul_(GAMMA)
    bits = _mix(_mix(keys.to(torch.int64).clone()).unsqueeze(-1) + counters)
    # 52 bits and a half: exactly representable, so neither 0 nor 1 can occur (with 53 bits the largest rounds to 1)
    return _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def position_keys(seed: int, requests: Sequence[int | str], positions: Tensor, purpose: str) -> Tensor:
    """Keys for draws at positions of requests.

    Args:
        seed: the run's seed.
        requests: `B` names; each row's keys depend on its own only.
        positions: `[B, R]` int64, absolute positions in the sequence.
        purpose: what the draws are for; different purposes have disjoint streams.

    Returns:
        `[B, R]` int64 keys for `uniform`.
    """
    if len(requests) != positions.shape[0]:
        raise ValueError(f"{len(requests)} requests for {positions.shape[0]} rows of positions")
    named = {request: key(seed, request, purpose) for request in set(requests)}
    base = torch.tensor([named[request] for request in requests], dtype=torch.int64, device=positions.device).unsqueeze(
        -1
    )
    return _mix(base + positions.to(torch.int64) * POSITION_GAMMA)


def shuffled(n: int, *parts: int | str) -> list[int]:
    """A permutation of `range(n)` that depends on `parts` alone."""
    return torch.argsort(uniform(torch.tensor(key("shuffled", *parts)), n), stable=True).tolist()


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the mask drops the copies of the sign bit
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64; works in place on `z`."""
    z.bitwise_xor_(_shift_right(z, 30)).mul_(MIX_1)
    z.bitwise_xor_(_shift_right(z, 27)).mul_(MIX_2)
    return z.bitwise_xor_(_shift_right(z, 31))
