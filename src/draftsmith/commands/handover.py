"""The commands at the border: check a checkpoint folder, bring one in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from draftsmith.drafters import checkpoint
from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options
from draftsmith.export import import_
from draftsmith.export.adapter import checker, target_card
from draftsmith.export.validate import check as findings_of
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.target.model import load_target


def check(folder: Path, target: str) -> bool:
    """Say what is wrong with a checkpoint for a target; True if nothing is."""
    model = load_target(target)
    card = target_card(model, target)
    embeddings = model.embedding.detach().cpu()
    found = findings_of(folder, card, embeddings=embeddings, forward=checker(embeddings.float()))
    for finding in found:
        console.say(f"{finding.severity}: {finding}")
    errors = sum(finding.severity == "error" for finding in found)
    console.say(
        f"{folder}: " + (f"{errors} errors" if errors else "nothing wrong found" if not found else "usable, see above")
    )
    return not errors


def bring_in(folder: Path, out: Path, target: str, settings: Sequence[str]) -> None:
    """Make a drafter artefact of a public checkpoint.

    Raises:
        UserError: not a checkpoint that can be recognised, or an EAGLE-1/2 head (not decoded by this version).
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
        folder, target_card(model, target), overrides=overrides, embeddings=embeddings, lm_head=lm_head
    )
    for note in found.notes:
        console.say(f"note: {note}")
    if found.kind != "eagle3":
        raise UserError(f"{folder}: an EAGLE-1/2 or HASS head; this version decodes EAGLE-3 heads only")
    head = Eagle3(validate(Eagle3Options, dict(found.config), str(folder)), found.vocab, model.embedding)
    head.load_state_dict(dict(found.tensors))
    with artefacts.writing(out, checkpoint.KIND, checkpoint.identity(head, model.spec.fingerprint)) as scratch:
        checkpoint.write(head, scratch)
    console.say(
        f"{out}: an EAGLE-3 head for {model.spec.name}; `draftsmith.load(target, drafters={str(out)!r})` uses it"
    )
