"""What this machine and environment are, what a target needs of them, and what will not work: for `draftsmith doctor`.

`look` reads the environment into plain facts, `needs` a target's configuration; `examine` judges both and touches
nothing, so that tests can fake any machine. torch is imported only inside, for a broken torch is one of the findings.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from draftsmith.foundation.console import size
from draftsmith.foundation.provenance import processor

Severity = Literal["error", "warning", "note"]
OLDEST_PYTHON = (3, 11)
# Tokens of a sample with its template and answer in what `needs` reckons for a feature store.
SAMPLE_TOKENS = 512
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")
# Packages that are built against one torch and break another one.
_SIBLINGS = ("torchvision", "torchaudio")


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


@dataclass(frozen=True)
class Needs:
    """What a target needs.

    Attributes:
        name: as it was given.
        weights: bytes of its weights in the format it is loaded in.
        dtype: that format.
        cache_per_token: bytes of keys and values for a token.
        features_per_token: bytes on disk for a token's features (three auxiliary states and the final one).
        problem: why it can't be used, if it can't; chat: whether it has a chat template.
    """

    name: str
    weights: int = 0
    dtype: str = "bfloat16"
    cache_per_token: int = 0
    features_per_token: int = 0
    positions: int = 0
    problem: str | None = None
    chat: bool = True


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
    for name in _SIBLINGS:
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


def look(folder: Path = Path()) -> Machine:
    """The environment of this process; `folder` is where runs would be written."""
    required = _required()
    versions: dict[str, str | None] = {name: _version(name) for name in required}
    for name in _SIBLINGS:
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


def needs(target: str) -> Needs:
    """What a target needs, from its configuration alone: no weights are read, for a hub id only the small files."""
    try:
        return _needs(target)
    except Exception as problem:  # whatever is wrong with it is a finding
        said = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        return Needs(target, problem=said if said.startswith(target) else f"{target}: {said}")


def _needs(target: str) -> Needs:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from draftsmith.data.features import estimated_bytes
    from draftsmith.drafters.eagle3 import auxiliary_layers
    from draftsmith.target import gguf
    from draftsmith.target.inside import attention_windows
    from draftsmith.target.protocol import FeatureSpec

    place = target
    if target == "smollm2" or target.endswith(".gguf"):
        file = gguf.smollm2() if target == "smollm2" else Path(target)
        place = str(gguf.convert(file, gguf.cache_root()))
    whole = AutoConfig.from_pretrained(place)
    config = whole.get_text_config()
    attention_windows(config, target)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    # as `load_target` takes it by default
    dtype = getattr(config, "dtype", None) or torch.float32
    width = torch.empty((), dtype=dtype).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = auxiliary_layers(None, config.num_hidden_layers)
    return Needs(
        name=target,
        weights=parameters * width,
        dtype=str(dtype).removeprefix("torch."),
        cache_per_token=2 * config.num_hidden_layers * heads * head * width,
        features_per_token=estimated_bytes(1, FeatureSpec(layers, True), config.hidden_size),
        positions=config.max_position_embeddings,
        chat=getattr(AutoTokenizer.from_pretrained(place), "chat_template", None) is not None,
    )
