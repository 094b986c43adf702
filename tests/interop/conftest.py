"""What all real servers are asked: prompts of one target, what vLLM answers without speculation, and a head."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from draftsmith.data.benchmarks import load_benchmark
from draftsmith.data.prompts import make_prompts
from draftsmith.decoding.engine import Engine
from draftsmith.drafters.checkpoint import Saved
from draftsmith.export.adapter import drafter_of
from draftsmith.export.checkpoint import HeadCheckpoint
from draftsmith.export.import_ import import_checkpoint
from draftsmith.target import chat, gguf
from draftsmith.target.model import HFTarget, load_target
from tests.interop import fitted
from tests.interop.servers import MAX_TOKENS, PROMPTS, by_vllm

DRAFT_VOCABULARY = 4096


@dataclass(frozen=True)
class Setting:
    """The target, its folder, and prompts as token ids."""

    folder: str
    target: HFTarget
    prompts: list[list[int]]
    work: Path

    def texts(self, answers: list[list[int]]) -> list[list[int]]:
        """Prompts with their answers."""
        return [prompt + answer for prompt, answer in zip(self.prompts, answers, strict=True)]


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = os.environ.get("DRAFTSMITH_INTEROP_TARGET") or str(gguf.convert(gguf.smollm2(), gguf.cache_root()))
    target = load_target(folder, dtype="float32", device="cpu")
    known = os.environ.get("DRAFTSMITH_DATA")
    asked = load_benchmark("gsm8k", PROMPTS) if known else make_prompts("word-problems", "test", PROMPTS, 0)
    prompts = [chat.prompt_ids(target.tokenizer, conversation.messages) for conversation in asked]
    assert len(prompts) == PROMPTS
    return Setting(folder, target, prompts, tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="session")
def plain(setting: Setting) -> list[list[int]]:
    """vLLM's own greedy answers, without speculation."""
    return [
        answer["ids"] for answer in by_vllm(setting.work, "plain", setting.folder, None, setting.prompts)["answers"]
    ]


@pytest.fixture(scope="session")
def eagle3(setting: Setting) -> tuple[Saved, HeadCheckpoint]:
    """A trained head (`DRAFTSMITH_INTEROP_HEAD`, any folder that `check` reads), or one fitted to our own answers."""
    if given := os.environ.get("DRAFTSMITH_INTEROP_HEAD"):
        checkpoint = import_checkpoint(Path(given), fitted.card(setting.target, setting.folder))
    else:
        answers = [Engine(setting.target).generate([p], max_new_tokens=MAX_TOKENS)[0] for p in setting.prompts]
        texts = setting.texts([answer.token_ids for answer in answers])
        checkpoint = fitted.eagle3(setting.target, setting.folder, texts, DRAFT_VOCABULARY)
    return drafter_of(checkpoint, setting.target, "the head"), checkpoint
