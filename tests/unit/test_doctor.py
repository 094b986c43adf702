"""The doctor on machines that are made up: each fault is named with how to mend it, a sound machine has none."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsmith import doctor
from draftsmith.doctor import Gpu, Machine, Needs, examine, look, needs
from tests.integration.command_line import draftsmith
from tests.integration.tiny_folder import VOCAB, write_target

GIB = 1 << 30
SOUND = Machine(
    versions={"torch": "2.13.0+cpu", "transformers": "5.23.0"},
    required={"torch": "2.9", "transformers": "5.17"},
    flags=frozenset({"avx2", "avx512_bf16", "amx_bf16"}),
    processor="Xeon",
    cores=4,
    threads=4,
    memory=32 * GIB,
    free_memory=20 * GIB,
    disk=("/home", 100 * GIB),
    cache=("/home", 100 * GIB),
)
H200 = Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0))
ON_GPU = replace(SOUND, torch_cuda="12.8", sees_gpu=True, gpus=(H200,), nvidia=("NVIDIA H200",))
SMALL = Needs("small", weights=GIB // 4, cache_per_token=46_080, features_per_token=4_700, positions=8192)


def said(machine: Machine, target: Needs | None = None) -> list[tuple[str, str]]:
    return [(f.severity, f"{f.what} → {f.mend}") for f in examine(machine, target)]


def test_sound_machines() -> None:
    assert said(SOUND, SMALL) == []
    assert said(ON_GPU, replace(SMALL, weights=16 * GIB)) == []


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"python": (3, 10, 4)}, "error", ["Python 3.10.4 is too old", "python3.12 -m venv"]),
        ({"bits": 32}, "error", ["32-bit"]),
        (
            {"versions": {"torch": "2.13.0+cpu", "transformers": "5.9.1"}},
            "error",
            ["transformers 5.9.1 is older than 5.17", "pip install -U 'transformers>=5.17'"],
        ),
        ({"versions": {"torch": "2.13.0+cpu", "transformers": None}}, "error", ["transformers is not installed"]),
        (
            {"versions": {**SOUND.versions, "torchvision": "0.21.0", "torchvision wants torch": "2.6.0"}},
            "warning",
            ["torchvision 0.21.0 was built for torch 2.6.0", "pip uninstall torchvision"],
        ),
        ({"torch_problem": "libcudart.so.12: cannot open"}, "error", ["torch can't be imported: libcudart"]),
        ({"nvidia": ("NVIDIA H200",)}, "warning", ["CPU build", "download.pytorch.org/whl/cu"]),
        (
            {"nvidia": ("NVIDIA H200",), "torch_cuda": "13.0"},
            "error",
            ["built for CUDA 13.0, but can't use NVIDIA H200", "driver"],
        ),
        (
            {"nvidia": ("NVIDIA H200",), "torch_cuda": "12.8", "hidden": ""},
            "warning",
            ["CUDA_VISIBLE_DEVICES is ''", "unset"],
        ),
        ({"torch_cuda": "12.8"}, "note", ["no GPU here"]),
        ({"flags": frozenset({"avx2"})}, "warning", ["no bfloat16 of its own", "target.dtype=float32"]),
        ({"flags": frozenset({"sse", "avx512_bf16"})}, "warning", ["no AVX2"]),
        ({"threads": 64}, "warning", ["64 threads on 4 usable cores", "OMP_NUM_THREADS=4"]),
        ({"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}}, "note", ["OMP_NUM_THREADS=1 keeps torch to 1 of 4"]),
        ({"disk": ("/full", GIB // 2)}, "warning", ["512.0 MiB are free in /full"]),
        ({"free_memory": GIB}, "warning", ["1.0 GiB of memory are free"]),
        ({"environment": {"HF_HUB_OFFLINE": "1"}}, "note", ["HF_HUB_OFFLINE is set"]),
    ],
)
def test_one_fault_at_a_time(changes: dict[str, object], severity: str, words: list[str]) -> None:
    found = said(replace(SOUND, **changes))  # type: ignore[arg-type]
    assert [s for s, _ in found] == [severity]
    assert all(word in found[0][1] for word in words), found


def test_gpus() -> None:
    old = replace(ON_GPU, gpus=(Gpu("Tesla T4", 16 * GIB, 15 * GIB, (7, 5)),))
    assert [(s, "target.dtype=float16" in text) for s, text in said(old)] == [("warning", True)]
    taken = replace(ON_GPU, gpus=(replace(H200, free=20 * GIB),))
    ((severity, text),) = said(taken)
    assert (severity, "120.0 GiB of 140.0 GiB are taken" in text) == ("warning", True)


@pytest.mark.parametrize(
    ("machine", "target", "severity", "words"),
    [
        (SOUND, replace(SMALL, weights=140 * GIB), "error", ["this machine's memory has 32.0 GiB in all"]),
        (SOUND, replace(SMALL, weights=25 * GIB), "warning", ["20.0 GiB of this machine's memory are free now"]),
        (ON_GPU, replace(SMALL, weights=140 * GIB), "error", ["NVIDIA H200 has 140.0 GiB", "target.device=map"]),
        (SOUND, replace(SMALL, features_per_token=GIB // 4000), "warning", ["features.store=kept"]),
        (SOUND, replace(SMALL, chat=False), "error", ["no chat template", "instruct"]),
        (SOUND, replace(SMALL, problem="small: linear attention"), "error", ["small: linear attention"]),
    ],
)
def test_targets(machine: Machine, target: Needs, severity: str, words: list[str]) -> None:
    found = said(machine, target)
    assert [s for s, _ in found] == [severity]
    assert all(word in found[0][1] for word in words), found


def test_the_worst_comes_first() -> None:
    machine = replace(SOUND, python=(3, 9, 0), environment={"HF_HUB_OFFLINE": "1"}, threads=9)
    assert [s for s, _ in said(machine)] == ["error", "warning", "note"]


def test_what_a_target_needs_is_what_it_has(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target")
    found = needs(str(folder))
    assert found.problem is None
    # by hand: 8 layers of 2 key heads of 8, hidden 32, intermediate 48, float32
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    layer = attention + 3 * 32 * 48 + 2 * 32
    assert found.weights == 4 * (2 * VOCAB * 32 + 8 * layer + 32)
    assert found.cache_per_token == 2 * 8 * 2 * 8 * 4
    assert found.features_per_token > 4 * 32 * 2
    assert (found.positions, found.chat, found.dtype) == (1024, True, "float32")


def test_a_target_that_is_none(tmp_path: Path) -> None:
    assert "nowhere" in str(needs(str(tmp_path / "nowhere")).problem)
    folder = write_target(tmp_path / "target", template=None)
    assert not needs(str(folder)).chat
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["layer_types"] = ["linear_attention"] * 8
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert needs(str(folder)).problem


def test_this_machine() -> None:
    found = look()
    assert found.versions["torch"] == torch.__version__ or str(found.versions["torch"]) in torch.__version__
    assert found.memory >= found.free_memory > 0
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.torch_problem is None
    assert found.disk[1] > 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "look", lambda folder: SOUND)
    ended = draftsmith("doctor")
    assert (ended.code, "Everything that draftsmith needs is here" in ended.out) == (0, True)
    ended = draftsmith("doctor", "--target", write_target(tmp_path / "target"))
    assert ended.code == 0
    assert "for 1,000 samples" in ended.out
    monkeypatch.setattr(doctor, "look", lambda folder: replace(SOUND, python=(3, 9, 1), threads=7))
    ended = draftsmith("doctor")
    assert ended.code == 1
    assert "error: Python 3.9.1 is too old" in ended.err
    assert "→ make an environment" in ended.out
    assert "1 thing will not work; mend it first" in ended.out
    monkeypatch.setattr(doctor, "look", lambda folder: SOUND)
    assert draftsmith("doctor", "--target", tmp_path / "nothing").code == 1
