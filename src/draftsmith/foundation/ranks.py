"""The processes of one `torchrun`: who this one is, what is its share, and sums over all of them.

A single process is a group of one: nothing is sent, nothing is waited for, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0; 0 writes logs and finishes artefacts."""
    return int(os.environ.get("RANK") or 0)


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every `world`-th, beginning with the rank's number."""
    return items[rank() :: world()]


def join() -> None:
    """Meet the other ranks, once; gloo between CPUs, nccl between GPUs, of which each rank takes its own."""
    import torch
    from torch import distributed

    if world() == 1 or distributed.is_initialized():
        return
    # A rank may wait long for another's work; of a rank that died torchrun tells the others.
    patience = timedelta(days=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=patience)
    else:
        distributed.init_process_group("gloo", timeout=patience)
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    sums([0.0])


def sums(values: Sequence[float], width: int | None = None) -> list[float]:
    """Each value summed over the ranks, in float64; all ranks get the same.

    Args:
        width: with fewer values than these, zeros follow: ranks may then bring different numbers of them.
    """
    padded = [*map(float, values), *[0.0] * ((width or len(values)) - len(values))]
    if world() == 1:
        return padded
    import torch
    from torch import distributed

    join()
    total = torch.tensor(padded, dtype=torch.float64)
    distributed.all_reduce(total)
    return [float(value) for value in total]


def first(value: float) -> float:
    """Rank 0's value, on every rank."""
    return sums([value if rank() == 0 else 0.0])[0]


def gathered(values: Tensor | None, label: int, device: object) -> tuple[Tensor, slice, int] | None:
    """Every rank's `[n]` values, one rank after another; which of them are this rank's; the label that they came with.

    All ranks call it together. One that has nothing to bring (None) gets what the others bring; where nobody brings
    anything the result is None.

    Args:
        label: the same on all ranks that bring something.
        device: where values lie.
    """
    if world() == 1:
        return None if values is None else (values, slice(0, len(values)), label)
    import torch
    from torch import distributed

    join()
    own = torch.tensor([-1 if values is None else len(values), label])
    told = [torch.empty_like(own) for _ in range(world())]
    distributed.all_gather(told, own)
    sizes = [int(size) for size, _ in told]
    if max(sizes) < 0:
        return None
    label = next(int(name) for size, name in told if int(size) >= 0)
    sent = torch.zeros(max(1, *sizes), dtype=torch.float64, device=str(device))
    if values is not None:
        sent[: len(values)] = values
    received = [torch.empty_like(sent) for _ in sizes]
    distributed.all_gather(received, sent)
    parts = [part[: max(size, 0)] for part, size in zip(received, sizes, strict=True)]
    start = sum(max(size, 0) for size in sizes[: rank()])
    everyone = torch.cat(parts).to(torch.float32 if values is None else values.dtype)
    return everyone, slice(start, start + max(sizes[rank()], 0)), label


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum gradients over the ranks, in place and as one message; where no rank has one there is none afterwards."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    join()
    trained = list(parameters)
    there = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([there, *(part.reshape(-1) for part in parts)])
    distributed.all_reduce(flat)
    place = len(trained)
    for known, p in zip(flat[:place].tolist(), trained, strict=True):
        if known:
            p.grad = flat[place : place + p.numel()].view_as(p).clone()
        place += p.numel()
