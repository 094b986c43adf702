"""This machine and environment as plain facts. torch is imported only inside, for a broken torch is one of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.foundation.provenance import processor

# Packages that are built against one torch and break another one.
SIBLINGS = ("torchvision", "torchaudio")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees: name, bytes in all and free, compute capability."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """An environment, as plain facts.

    Attributes:
        python: its version; 64 bits or not is `bits`.
        versions: of the packages that draftsmith needs (None: not installed) and of some that may disturb.
        required: the oldest version that draftsmith takes, by package.
        torch_problem: why torch can't be imported, if it can't.
        torch_cuda: the CUDA (or ROCm) version that torch was built for; None for a CPU build.
        sees_gpu: torch can use a GPU.
        gpus: those it sees.
        nvidia: names of the GPUs that the driver lists, whatever torch sees; None without a driver.
        hidden: the value of CUDA_VISIBLE_DEVICES, if it is set.
        processor: its name; flags: what it can, as the kernel names it.
        cores: that this process may use, limits of a container included; threads: that torch would start.
        memory, free_memory: bytes, limits of a container included.
        disk, cache: folders and their free bytes: the working folder's and that of converted models.
        environment: variables that change what happens.
    """

    python: tuple[int, int, int] = (3, 12, 0)
    bits: int = 64
    system: str = "Linux"
    versions: Mapping[str, str | None] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)
    torch_problem: str | None = None
    torch_cuda: str | None = None
    sees_gpu: bool = False
    gpus: Sequence[Gpu] = ()
    nvidia: Sequence[str] | None = None
    hidden: str | None = None
    processor: str = ""
    flags: frozenset[str] = frozenset()
    cores: int = 1
    threads: int = 1
    memory: int = 0
    free_memory: int = 0
    disk: tuple[str, int] = (".", 0)
    cache: tuple[str, int] = (".", 0)
    environment: Mapping[str, str] = field(default_factory=dict)


def look(folder: Path = Path()) -> Machine:
    """The environment of this process; `folder` is where runs would be written."""
    required = _required()
    versions: dict[str, str | None] = {name: _version(name) for name in required}
    for name in SIBLINGS:
        if found := _version(name):
            versions[name] = found
            versions[f"{name} wants torch"] = _wanted_torch(name)
    memory, free = _memory()
    cache = _existing(_cache_root())
    return Machine(
        python=sys.version_info[:3],
        bits=64 if sys.maxsize > 2**32 else 32,
        system=platform.system(),
        versions=versions,
        required=required,
        nvidia=_nvidia(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        processor=processor(),
        flags=_flags(),
        cores=_cores(),
        memory=memory,
        free_memory=free,
        disk=(str(folder.resolve()), shutil.disk_usage(_existing(folder)).free),
        cache=(str(cache), shutil.disk_usage(cache).free),
        environment={n: os.environ[n] for n in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME") if n in os.environ},
        **_of_torch(),
    )


def _of_torch() -> dict[str, Any]:
    try:
        import torch

        found: dict[str, Any] = {
            "torch_cuda": torch.version.cuda or torch.version.hip,
            "threads": torch.get_num_threads(),
            "sees_gpu": torch.cuda.is_available(),
        }
        gpus = []
        for i in range(torch.cuda.device_count() if found["sees_gpu"] else 0):
            free, whole = torch.cuda.mem_get_info(i)
            gpus.append(Gpu(torch.cuda.get_device_name(i), whole, free, torch.cuda.get_device_capability(i)))
        return {**found, "gpus": gpus}
    except (ImportError, OSError, RuntimeError) as problem:
        return {"torch_problem": str(problem).splitlines()[0] if str(problem) else type(problem).__name__}


def _required() -> dict[str, str]:
    try:
        wanted = importlib.metadata.requires("draftsmith") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        wanted = ["torch", "transformers", "safetensors", "pydantic", "typer", "rich", "numpy"]
    matches = (_REQUIREMENT.match(one) for one in wanted if "extra ==" not in one)
    return {match[1]: match[2] or "" for match in matches if match}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted_torch(package: str) -> str | None:
    for one in importlib.metadata.requires(package) or []:
        if match := re.match(r"^torch\s*==\s*([0-9.]+)", one):
            return match[1]
    return None


def _nvidia() -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return names if done.returncode == 0 and names else None


def _flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal():
        usable = min(usable, max(1, round(int(quota[0]) / int(quota[1]))))
    return usable


def _memory() -> tuple[int, int]:
    """Bytes in all and free; of a container its own."""
    table = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in _read("/proc/meminfo").splitlines()
        if len(line.split()) > 1 and line.split()[1].isdecimal()
    }
    whole, free = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    if not whole and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and int(limit) < whole:
        whole = int(limit)
        free = min(free, whole - int(used)) if used.isdecimal() else min(free, whole)
    return whole, free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cache_root() -> Path:
    try:
        from draftsmith.target.gguf import cache_root

        return cache_root()
    except ImportError:
        return Path.home() / ".cache"


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
