"""Standalone drafts: a plain transformers folder, the same for every engine. Heads can't be run by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

from draftsmith.export import card, serving
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras, StandaloneDraft
from draftsmith.export.weights import INDEX, read_config, weight_files
from draftsmith.foundation.artefacts import writing
from draftsmith.foundation.errors import UserError

# Everything a tokenizer or a generation configuration may consist of; never pickles, code or another tool's records.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


def export(drafter: Drafter, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write a folder for `target.generate(assistant_model=…)`.

    Raises:
        UserError: the drafter is a head.
    """
    if not isinstance(drafter, StandaloneDraft):
        raise UserError(
            "transformers' assisted generation takes a whole language model as its assistant and hands it no hidden "
            f"states, which an {drafter.kind} head reads: use --to vllm or --to sglang, or draftsmith's own engine"
        )
    return copy(drafter, folder, "transformers", extras)


def copy(draft: StandaloneDraft, folder: Path, server: str, extras: Extras) -> Exported:
    """Copy a draft's folder, bit for bit, with a card and the command for `server`.

    Raises:
        UserError: it is no model folder, needs code of its own, or has another vocabulary than the target.
    """
    config = read_config(draft.folder)
    files = weight_files(draft.folder)
    if config.get("auto_map"):
        raise UserError(
            f"{draft.folder / 'config.json'}: auto_map: this model needs code from its folder, which is not copied"
        )
    if not (draft.folder / "tokenizer.json").is_file() and not (draft.folder / "tokenizer.model").is_file():
        raise UserError(f"{draft.folder} has no tokenizer: save the target's beside the draft, both must be the same")
    vocab_size = (config.get("text_config") or config).get("vocab_size")
    if vocab_size != draft.target.vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size} in the draft and {draft.target.vocab_size} in the target {draft.target.name}: "
            "a draft of another vocabulary is not exported; draft with a model of the target's own family"
        )
    commands = serving.commands(server, "standalone", draft.target, folder, extras)
    exported = Exported(folder, server, commands)
    names = [name for name in (*_BESIDE, INDEX) if (draft.folder / name).is_file()]
    target = {"name": draft.target.name, "fingerprint": draft.target.fingerprint}
    with writing(folder, "export", {"kind": "standalone", "server": server, "target": target}) as scratch:
        for path in [*files, *(draft.folder / name for name in names)]:
            shutil.copyfile(path, scratch / path.name)
        (scratch / "README.md").write_text(card.render(exported, draft, extras.facts), encoding="utf-8")
    return exported
