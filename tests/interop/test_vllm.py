"""Our exports in a real vLLM, greedy, float32: the same text as without speculation, the same counts as our engine.

    make interop

`DRAFTSMITH_INTEROP_TARGET` names another folder than SmolLM2's, `DRAFTSMITH_DATA` a folder with `eval_gsm8k_test.jsonl`
(without it made word problems), `DRAFTSMITH_INTEROP_PROMPTS` how many, `DRAFTSMITH_INTEROP_HEAD` a trained
export in place of the fitted head; figures are written to `DRAFTSMITH_INTEROP_OUT` where that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import draftsmith
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.export.adapter import drafter_of, standalone_of
from draftsmith.export.checkpoint import Extras, Serving, StandaloneDraft
from draftsmith.export.hand_over import export
from draftsmith.export.served import Asking, causes, compare, rounds_of
from draftsmith.export.validate import check
from draftsmith.target.model import load_target
from draftsmith.target.vocabulary import VocabMap
from tests.interop import fitted
from tests.interop.conftest import Setting
from tests.interop.servers import (
    CHAIN,
    MAX_TOKENS,
    VLLM_ENV,
    by_vllm,
    environment,
    figures,
    free_port,
    listening,
    vllm_python,
)

pytestmark = [pytest.mark.interop, pytest.mark.timeout(7200)]


def judge(name: str, plain: Sequence[Sequence[int]], served: Any, ours: Sequence[int]) -> None:
    """At least 28 of 30 answers equal vLLM's own without speculation; counts as ours over the same texts.

    Args:
        ours: accepted drafts over each of the plain answers, counted as vLLM does; compared where the text is equal.
    """
    answers = served["answers"]
    same = [i for i, answer in enumerate(answers) if answer["ids"] == plain[i]]
    accepted = [answer["counts"]["accepted_tokens"] for answer in answers]
    rounds = [answer["counts"]["drafts"] for answer in answers]
    off = [abs(accepted[i] - ours[i]) for i in same]
    there, here = sum(accepted[i] for i in same), sum(ours[i] for i in same)
    found = {
        "vllm": served["vllm"],
        "torch": served["torch"],
        "prompts": len(answers),
        "text_as_without_speculation": len(same),
        "rounds": sum(rounds),
        "accepted": sum(accepted),
        "acceptance_length": round(1 + sum(accepted) / sum(rounds), 4),
        "accepted_where_the_text_is_equal": there,
        "accepted_by_our_engine": here,
        "prompts_with_another_count": sum(d > 0 for d in off),
        "largest_difference_of_a_prompt": max(off),
    }
    figures(name, found)
    assert sum(accepted) >= 0.05 * sum(rounds), f"too little accepted to have shown anything: {found}"
    assert len(same) * 30 >= 28 * len(answers), found
    assert max(off) <= 1, found
    assert abs(there - here) <= max(1, 0.01 * here), found


def ours(setting: Setting, drafter: Drafter, plain: Sequence[Sequence[int]]) -> list[int]:
    """Accepted drafts of each plain answer in our engine's chain mode."""
    rounds = rounds_of(setting.target, drafter, ChainGrowth(CHAIN), setting.prompts, plain)
    return [sum(r.accepted for r in answer) for answer in rounds]


@pytest.mark.parametrize("server", ["vllm", "speculators"])
def test_eagle3(setting: Setting, plain: Any, eagle3: Any, server: str) -> None:
    head, checkpoint = eagle3
    exported = export(checkpoint, server, setting.work / f"e3-{server}", Extras(serving=Serving(tokens=CHAIN)))
    assert check(exported.folder, checkpoint.target, embeddings=setting.target.embedding) == []
    speculative = {"method": "eagle3", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = by_vllm(setting.work, f"e3-{server}", setting.folder, speculative, setting.prompts)
    judge(f"EAGLE-3 head, {server} format", plain, served, ours(setting, head, plain))


def test_the_speculators_folder_alone(setting: Setting, plain: Any, eagle3: Any) -> None:
    """`vllm serve FOLDER`: target, method and tokens come from its configuration."""
    exported = export(eagle3[1], "speculators", setting.work / "alone", Extras(serving=Serving(tokens=CHAIN)))
    served = by_vllm(setting.work, "alone", str(exported.folder), None, setting.prompts[:2])
    assert [a["ids"] for a in served["answers"]] == plain[:2]
    assert sum(a["counts"]["drafts"] for a in served["answers"]) > 0


def test_eagle(setting: Setting, plain: Any) -> None:
    """Fitted to the very answers; counts by our engine and by the formula, without cache or engine."""
    checkpoint = fitted.eagle(setting.target, setting.folder, setting.texts(plain))
    exported = export(checkpoint, "vllm", setting.work / "e1")
    speculative = {"method": "eagle", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = by_vllm(setting.work, "e1", setting.folder, speculative, setting.prompts)
    accepts = ours(setting, drafter_of(checkpoint, setting.target, "the head"), plain)
    assert accepts == fitted.eagle_accepts(checkpoint, setting, plain, CHAIN)
    judge("EAGLE head", plain, served, accepts)


def test_standalone(setting: Setting, plain: Any) -> None:
    """The target with weights of few bits as its draft; counts by our engine and by a teacher-forced pass."""
    folder = fitted.coarse(Path(setting.folder), setting.work / "coarse")
    draft = StandaloneDraft(folder, fitted.card(setting.target, setting.folder))
    exported = export(draft, "vllm", setting.work / "draft")
    speculative = {"method": "draft_model", "model": str(exported.folder), "num_speculative_tokens": CHAIN}
    served = by_vllm(setting.work, "draft", setting.folder, speculative, setting.prompts)
    accepts = ours(setting, standalone_of(folder, setting.target), plain)
    reader = load_target(folder, dtype="float32", device="cpu")
    assert accepts == fitted.standalone_accepts(reader, setting, plain, CHAIN)
    judge("standalone draft", plain, served, accepts)


def test_the_ngram_proposer(setting: Setting, plain: Any) -> None:
    """draftsmith's own n-grams in vLLM, by its `custom_class`."""
    source = str(Path(draftsmith.__file__).parents[1])
    speculative = {"method": "custom_class", "model": "draftsmith.export.vllm_proposer.NgramProposer"}
    speculative |= {"num_speculative_tokens": CHAIN}
    more = {"PYTHONPATH": source}
    served = by_vllm(setting.work, "ngram", setting.folder, speculative, setting.prompts, more)
    drafter = NgramDrafter(NgramOptions(guess=False), VocabMap.identity(setting.target.spec.vocab_size))
    judge("n-grams, as a plug-in", plain, served, ours(setting, drafter, plain))


def test_check_served(setting: Setting, eagle3: Any) -> None:
    """`draftsmith check --served` on a server that is in order, and on one that drafts with another head."""
    head, checkpoint = eagle3
    numbers = Serving(tokens=CHAIN, depth=4, top_k=4, nodes=11)
    exported = export(checkpoint, "vllm", setting.work / "served", Extras(serving=numbers))
    port = free_port()
    speculative = f'{{"method": "eagle3", "model": "{exported.folder}", "num_speculative_tokens": {CHAIN}}}'
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", setting.folder]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "4"]
    command += ["--port", str(port), "--speculative-config", speculative]
    asking = Asking(setting.prompts[:8], MAX_TOKENS)
    with listening(command, setting.work / "server.log", port, environment() | VLLM_ENV) as url:
        found = compare(url, setting.target, head, asking, numbers, CHAIN)
        broken = fitted.with_rolled_fc(head)
        wrong = compare(url, setting.target, broken, asking, numbers, CHAIN)
    figures(
        "check --served, EAGLE-3 head",
        {
            "prompts": len(asking.prompts),
            "served": round(found.served.acceptance_length, 4),
            "replayed": round(found.chain.acceptance_length, 4),
            "replayed_after_the_cut": round(found.chain.acceptance_length_after_cut, 4),
            "replayed_as_a_tree": round(found.tree.acceptance_length, 4),
        },
    )
    assert [f for f in causes(found) if f.severity == "error"] == []
    assert any("chain or tree" in f.problem for f in causes(found))
    assert found.served.accepted == found.chain.accepted
    (error,) = [f for f in causes(wrong) if f.severity == "error"]
    assert "another drafter" in error.problem
