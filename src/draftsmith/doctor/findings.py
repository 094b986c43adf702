"""What is wrong with an environment, or not enough for a target: a judgement of facts that touches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from draftsmith.doctor.machine import SIBLINGS, Machine
from draftsmith.doctor.target import Needs
from draftsmith.foundation.console import size

Severity = Literal["error", "warning", "note"]
OLDEST_PYTHON = (3, 11)
# Tokens of a sample with its template and answer in what a feature store is reckoned from.
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Finding:
    """Something to know: how bad it is, what it is, and what to do about it."""

    severity: Severity
    what: str
    mend: str = ""


def examine(machine: Machine, needs: Needs | None = None) -> list[Finding]:
    """All that is wrong or worth knowing, worst first."""
    found = [*_python(machine), *_packages(machine), *_torch(machine), *_processor(machine), *_room(machine)]
    if needs is not None:
        found += _target(machine, needs)
    rank = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.severity])


def _python(m: Machine) -> Iterator[Finding]:
    if m.python[:2] < OLDEST_PYTHON:
        yield Finding(
            "error",
            f"Python {'.'.join(map(str, m.python))} is too old",
            "make an environment with Python 3.11 or newer: python3.12 -m venv .venv",
        )
    if m.bits != 64:
        yield Finding("error", f"this Python is a {m.bits}-bit program, and torch needs 64", "install a 64-bit Python")


def _packages(m: Machine) -> Iterator[Finding]:
    for name, oldest in m.required.items():
        have = m.versions.get(name)
        if have is None:
            yield Finding("error", f"the package {name} is not installed", f"pip install '{name}>={oldest or 0}'")
        elif oldest and _older(have, oldest):
            yield Finding(
                "error",
                f"{name} {have} is older than {oldest}, which draftsmith needs",
                f"pip install -U '{name}>={oldest}'",
            )
    torch = m.versions.get("torch")
    for name in SIBLINGS:
        have = m.versions.get(name)
        wanted = m.versions.get(f"{name} wants torch")
        if have and torch and wanted and not _same_release(torch, wanted):
            yield Finding(
                "warning",
                f"{name} {have} was built for torch {wanted}, and torch {torch} is installed: importing transformers "
                "may fail with an error about operators",
                f"draftsmith does not need it: pip uninstall {name}",
            )


def _torch(m: Machine) -> Iterator[Finding]:
    if m.torch_problem:
        yield Finding(
            "error",
            f"torch can't be imported: {m.torch_problem}",
            "install it anew, on its own first: pip install --force-reinstall torch",
        )
        return
    if m.nvidia and not m.torch_cuda:
        yield Finding(
            "warning",
            f"there is a GPU ({m.nvidia[0]}), but this torch is a CPU build: everything will run on the processor",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128 (or the CUDA "
            "version that nvidia-smi shows at its top)",
        )
    elif m.nvidia and not m.sees_gpu:
        if m.hidden is not None:
            yield Finding(
                "warning",
                f"torch sees no GPU because CUDA_VISIBLE_DEVICES is {m.hidden!r}",
                "unset CUDA_VISIBLE_DEVICES, or name a GPU in it: CUDA_VISIBLE_DEVICES=0",
            )
        else:
            yield Finding(
                "error",
                f"torch was built for CUDA {m.torch_cuda}, but can't use {m.nvidia[0]}: the driver is most likely too "
                "old for it",
                "update the NVIDIA driver, or install a torch for an older CUDA (nvidia-smi shows the newest that the "
                "driver takes)",
            )
    elif m.torch_cuda and not m.nvidia and not m.sees_gpu:
        yield Finding("note", "torch is a CUDA build, and there is no GPU here: it works, on the processor")
    for gpu in m.gpus:
        if gpu.capability < (8, 0):
            yield Finding(
                "warning",
                f"{gpu.name} has no bfloat16 of its own (compute capability {gpu.capability[0]}.{gpu.capability[1]}): "
                "it is emulated, slowly",
                "use target.dtype=float16 or float32",
            )
        if gpu.memory and gpu.free < 0.5 * gpu.memory:
            yield Finding(
                "warning",
                f"{gpu.name}: {size(gpu.memory - gpu.free)} of {size(gpu.memory)} are taken by other programs",
                "end them (nvidia-smi lists them), or choose another GPU by CUDA_VISIBLE_DEVICES",
            )


def native_bfloat16(m: Machine) -> str | None:
    """What computes bfloat16 on this processor: `AMX`, `AVX-512`, `ARM`; None where it is emulated."""
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512"), ("bf16", "ARM")):
        if flag in m.flags:
            return name
    return None


def _processor(m: Machine) -> Iterator[Finding]:
    if m.sees_gpu or m.torch_problem:
        return
    if m.flags and not native_bfloat16(m):
        yield Finding(
            "warning",
            "this processor has no bfloat16 of its own: a bfloat16 target runs, but slowly",
            "measure with target.dtype=float32 as well; it takes twice the memory and may be faster",
        )
    if m.flags and not m.flags & {"avx2", "asimd"}:
        yield Finding("warning", "this processor has no AVX2: expect everything to be slow", "use a newer machine")
    if m.threads > m.cores:
        yield Finding(
            "warning",
            f"torch would start {m.threads} threads on {m.cores} usable core{'s' * (m.cores > 1)}: they get in each "
            "other's way",
            f"set target.threads={m.cores}, or OMP_NUM_THREADS={m.cores} in the environment",
        )
    elif m.threads < m.cores and "OMP_NUM_THREADS" in m.environment:
        yield Finding(
            "note",
            f"OMP_NUM_THREADS={m.environment['OMP_NUM_THREADS']} keeps torch to {m.threads} of {m.cores} cores",
            "unset it, or set target.threads, to use them all",
        )


def _room(m: Machine) -> Iterator[Finding]:
    for (folder, free), least, what in (
        (m.disk, 1 << 30, "a small run takes about 1 GiB"),
        (m.cache, 1 << 29, "converted models are kept there"),
    ):
        if free < least:
            yield Finding(
                "warning", f"only {size(free)} are free in {folder}: {what}", "free some space, or use another folder"
            )
    if m.free_memory and m.free_memory < 2 << 30:
        yield Finding(
            "warning",
            f"only {size(m.free_memory)} of memory are free: even the quick start's small model needs about 2 GiB",
            "close other programs",
        )
    if m.environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding(
            "note",
            "HF_HUB_OFFLINE is set: nothing is fetched from the hub, only what is on this machine can be used",
            "unset it to name targets and data sets by their hub ids",
        )


def _target(m: Machine, needs: Needs) -> Iterator[Finding]:
    if needs.problem:
        yield Finding("error", needs.problem, "give another target")
        return
    device, free, whole = _place(m)
    enough = needs.weights * 1.1 + needs.cache_per_token * 2048
    if whole and enough > whole:
        yield Finding(
            "error",
            f"{needs.name} needs {size(int(enough))} ({needs.dtype} weights and a cache of 2,048 tokens), and {device} "
            f"has {size(whole)} in all",
            "take a smaller target or a larger machine; several GPUs share one with target.device=map",
        )
    elif free and enough > free:
        yield Finding(
            "warning",
            f"{needs.name} needs {size(int(enough))}, and {size(free)} of {device} are free now",
            "end other programs first",
        )
    features = 1000 * SAMPLE_TOKENS * needs.features_per_token
    if features > m.disk[1]:
        yield Finding(
            "warning",
            f"features of 1,000 samples take {size(features)}, and {size(m.disk[1])} are free in {m.disk[0]}",
            "keep fewer samples (features.store=kept, a smaller select.ratio), or use another folder",
        )
    if not needs.chat:
        yield Finding(
            "error",
            f"{needs.name} has no chat template, so prompts can't be put to it",
            "use the instruct or chat version of the model",
        )


def _place(m: Machine) -> tuple[str, int, int]:
    """Where a target would be loaded: name, free bytes, bytes in all."""
    if m.sees_gpu and m.gpus:
        return m.gpus[0].name, m.gpus[0].free, m.gpus[0].memory
    return "this machine's memory", m.free_memory, m.memory


def _older(have: str, oldest: str) -> bool:
    return _numbers(have) < _numbers(oldest)


def _same_release(one: str, other: str) -> bool:
    return _numbers(one)[:3] == _numbers(other)[:3]


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))
