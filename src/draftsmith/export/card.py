"""The model card that goes with an export: what it is, what it was made from, what was measured, and how to serve it.

Nothing is left out in silence: what is not known is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from draftsmith.export.checkpoint import Drafter, Exported, HeadCheckpoint, TargetCard

MISSING = "not recorded"

# Keys of `facts`, in the card's order, with their headings. A value is text, a mapping, or rows (a list of mappings).
SECTIONS = {
    "data": "Data",
    "training": "Training",
    "training_cost": "Training cost",
    "acceptance": "Acceptance measured",
}

_TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "speculators": "vLLM (speculators format)",
    "transformers": "transformers",
    "gguf": "llama.cpp",
}

_CAUTIONS = {
    "vllm": (
        "Name the method, as above: vLLM otherwise takes it from the path (`eagle-` in it means EAGLE-1).",
        "vLLM drafts chains, so expect the acceptance length of a chain of `num_speculative_tokens`, not that of a "
        "tree.",
    ),
    "sglang": ("`--speculative-num-draft-tokens` counts the root: it is one more than draftsmith's node budget.",),
    "speculators": (
        "The first command names everything; the second takes the target and the number of tokens from `config.json`.",
    ),
    "transformers": (
        "The loop runs the draft one token at a time in Python: faster only where the target is much larger.",
    ),
    "gguf": (
        "The first command is llama.cpp's own converter, from its source tree; `TARGET.gguf` is the target, converted "
        "the same way.",
    ),
}


def render(exported: Exported, drafter: Drafter, facts: Mapping[str, object]) -> str:
    """The text of `README.md`.

    Args:
        exported: folder, commands and notes.
        drafter: what was exported.
        facts: by the keys of `SECTIONS`, and `licence` (of the drafter), `data_licence`; further keys get sections of
            their own.
    """
    target = drafter.target
    kind = drafter.kind if isinstance(drafter, HeadCheckpoint) else "standalone"
    what = {"eagle": "EAGLE head", "eagle3": "EAGLE-3 head", "standalone": "Standalone draft"}[kind]
    lines = [
        *_front_matter(drafter, target, facts),
        f"# {what} for {target.name}",
        "",
        f"A drafter for speculative decoding of `{target.name}`, made with draftsmith. It proposes tokens, which the "
        "target checks: the target's output distribution does not change. It is of no use with another target, a "
        "fine-tuned one included.",
        "",
        "## Serve it",
        "",
        f"With {_TITLES[exported.server]}:",
        "",
    ]
    language = "python" if exported.server == "transformers" else "sh"
    for command in exported.commands:
        lines += [f"```{language}", command, "```", ""]
    lines += [f"- {caution}" for caution in (*_CAUTIONS[exported.server], *exported.notes)]
    lines += ["", "## Target", "", *_target(target)]
    if isinstance(drafter, HeadCheckpoint):
        lines += ["", "## Shape", "", *_shape(drafter)]
    further = {key: key.replace("_", " ").capitalize() for key in facts if key not in SECTIONS and "licence" not in key}
    for key, title in {**SECTIONS, **further}.items():
        lines += ["", f"## {title}", "", *_value(facts.get(key))]
    licences = {
        "this drafter": facts.get("licence"),
        "target": target.licence or None,
        "training data": facts.get("data_licence"),
    }
    lines += ["", "## Licences", "", *(f"- {of}: {_text(value)}" for of, value in licences.items()), ""]
    return "\n".join(lines)


def _front_matter(drafter: Drafter, target: TargetCard, facts: Mapping[str, object]) -> list[str]:
    tags = ["speculative-decoding", "draftsmith"]
    tags += [drafter.kind] if isinstance(drafter, HeadCheckpoint) else ["draft-model"]
    lines = ["---", f"tags: [{', '.join(tags)}]"]
    if licence := facts.get("licence"):
        lines.append(f"license: {json.dumps(str(licence), ensure_ascii=False)}")
    # The hub reads this as one of its ids; a folder's path would be refused.
    if target.name.count("/") == 1 and not target.name.startswith((".", "/", "~")):
        lines.append(f"base_model: {json.dumps(target.name)}")
    return [*lines, "---", ""]


def _target(target: TargetCard) -> list[str]:
    return [
        f"- name: `{target.name}`",
        f"- architecture: {', '.join(target.architectures) or MISSING}",
        f"- weights' fingerprint: {target.fingerprint or MISSING}",
        f"- quantisation: {target.quantisation or MISSING}",
        f"- RoPE: {json.dumps(dict(target.rope))}",
        f"- longest position: {target.max_positions or MISSING}",
    ]


def _shape(head: HeadCheckpoint) -> list[str]:
    parameters = sum(tensor.numel() for tensor in head.tensors.values())
    lines = [f"- parameters: {parameters:,} ({head.dtype}); embeddings are the target's and not stored"]
    if head.kind == "eagle":
        return [*lines, "- reads the target's last hidden state (after the final norm) and shares its `lm_head`"]
    layers = ", ".join(map(str, head.auxiliary_layers))
    vocabulary = f"- draft vocabulary: {head.vocab.size:,} of {head.vocab.vocab_size:,} tokens (`d2t` holds offsets)"
    if head.vocab.filled:
        vocabulary += f"; {head.vocab.filled:,} of them never occurred in the training data and only fill it up"
    return [
        *lines,
        f"- reads the inputs of the target's layers {layers} (transformers' `hidden_states[k]`)",
        vocabulary,
    ]


def _value(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {key}: {_text(inner)}" for key, inner in value.items()] or [MISSING]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(row, Mapping) for row in value):
            return _table([dict(row) for row in value])
        return [f"- {_text(inner)}" for inner in value] or [MISSING]
    return [_text(value)]


def _table(rows: list[dict[str, object]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [f"| {' | '.join(_text(row.get(column)) for column in columns)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *body]


def _text(value: object) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
