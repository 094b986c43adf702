"""The commands at the border: check a checkpoint folder, bring one in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from torch import nn

from draftsmith.data.benchmarks import load_benchmark
from draftsmith.data.prompts import make_prompts
from draftsmith.drafters import checkpoint
from draftsmith.drafters.checkpoint import Saved
from draftsmith.export import import_
from draftsmith.export.adapter import checker, drafter_of, standalone_of, target_card
from draftsmith.export.findings import Finding
from draftsmith.export.served import Asking, causes, compare, serving_of
from draftsmith.export.validate import check as findings_of
from draftsmith.export.weights import read_config
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.target import chat
from draftsmith.target.model import HFTarget, load_target


def check(
    folder: Path,
    target: str,
    dtype: str = "auto",
    served: str | None = None,
    prompts: str | None = None,
    limit: int = 16,
    tokens: int = 64,
) -> bool:
    """Say what is wrong with a checkpoint for a target; True if nothing is.

    Args:
        served: address of a server that runs both; its acceptance is then compared too, where the folder is sound.
        prompts: a benchmark's name or a file to ask it; made word problems by default.
        limit: prompts at most.
        tokens: tokens of an answer at most.
    """
    model = load_target(target, dtype=dtype)
    card = target_card(model, target)
    embeddings = model.embedding.detach().cpu()
    found = findings_of(folder, card, embeddings=embeddings, forward=checker(model))
    if served and not any(finding.severity == "error" for finding in found):
        found += _served(folder, model, target, served, prompts, limit, tokens)
    for finding in found:
        console.say(f"{finding.severity}: {finding}")
    errors = sum(finding.severity == "error" for finding in found)
    console.say(
        f"{folder}: " + (f"{errors} errors" if errors else "nothing wrong found" if not found else "usable, see above")
    )
    return not errors


def _served(
    folder: Path, model: HFTarget, target: str, url: str, prompts: str | None, limit: int, tokens: int
) -> list[Finding]:
    if import_.recognise(folder) == "standalone":
        drafter: Saved = standalone_of(folder, model)
    else:
        embeddings = model.embedding.detach().cpu()
        lm_head = model.model.get_output_embeddings().weight.detach().cpu()
        card = target_card(model, target)
        found = import_.import_checkpoint(folder, card, embeddings=embeddings, lm_head=lm_head)
        drafter = drafter_of(found, model, str(folder))
    assert isinstance(drafter, nn.Module)
    drafter.to(model.dtype)
    asked = load_benchmark(prompts, limit) if prompts else make_prompts("word-problems", "test", limit, 0)
    ids = [chat.prompt_ids(model.tokenizer, conversation.messages) for conversation in asked]
    serving, promised = serving_of(read_config(folder))
    comparison = compare(url, model, drafter, Asking(ids, tokens), serving, promised)
    console.table(
        f"Acceptance length on {len(ids)} prompts, {comparison.tokens} tokens",
        ["how it is counted", "tokens a round"],
        [[how, f"{length:.3f}"] for how, length in comparison.rows()],
    )
    return causes(comparison)


def bring_in(folder: Path, out: Path, target: str, settings: Sequence[str], *, keep_rope: bool = False) -> None:
    """Make a drafter artefact of a public checkpoint.

    Raises:
        UserError: not a checkpoint that can be recognised, or another rotary embedding than the target's without
            `keep_rope`.
    """
    model = load_target(target)
    overrides: dict[str, object] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write field=value")
        overrides[name] = yaml.safe_load(value)
    embeddings = model.embedding.detach().cpu()
    lm_head = model.model.get_output_embeddings().weight.detach().cpu()
    found = import_.import_checkpoint(
        folder,
        target_card(model, target),
        overrides=overrides,
        embeddings=embeddings,
        lm_head=lm_head,
        keep_rope=keep_rope,
    )
    for note in found.notes:
        console.say(f"note: {note}")
    head = drafter_of(found, model, str(folder))
    with artefacts.writing(out, checkpoint.KIND, checkpoint.identity(head, model.spec.fingerprint)) as scratch:
        checkpoint.write(head, scratch)
    console.say(
        f"{out}: an {head.LABEL} for {model.spec.name}; `draftsmith.load(target, drafters={str(out)!r})` uses it"
    )
