"""`draftsmith doctor`: what is here, what a target needs, what is wrong and how to mend it."""

from __future__ import annotations

from pathlib import Path

from draftsmith import doctor as examining
from draftsmith.doctor import SAMPLE_TOKENS, Machine, Needs
from draftsmith.foundation import console


def doctor(target: str | None = None, folder: Path = Path()) -> bool:
    """Print facts and findings; True if all will work.

    Args:
        target: also say what this target needs.
        folder: where runs would be written.
    """
    machine = examining.look(folder)
    needed = examining.needs(target) if target else None
    console.table("This machine", ["", ""], facts(machine), align_right_from=2)
    if needed and not needed.problem:
        console.table(f"What {needed.name} needs", ["", ""], target_facts(needed), align_right_from=2)
    found = examining.examine(machine, needed)
    for finding in found:
        if finding.severity == "note":
            console.say(f"note: {finding.what}")
        else:
            (console.error if finding.severity == "error" else console.warn)(finding.what)
        if finding.mend:
            console.say(f"    → {finding.mend}")
    errors = sum(finding.severity == "error" for finding in found)
    if errors:
        console.say(f"\n{errors} thing{'s' * (errors > 1)} will not work; mend {'them' if errors > 1 else 'it'} first.")
    elif target is None:
        console.say("\nEverything that draftsmith needs is here. What a model needs: draftsmith doctor --target NAME")
    else:
        console.say(f"\nEverything that draftsmith and {target} need is here.")
    return not errors


def facts(m: Machine) -> list[list[str]]:
    """The machine as rows of a table."""
    bf16 = examining.native_bfloat16(m)
    gpus = [f"{g.name}, {console.size(g.memory)} ({console.size(g.free)} free)" for g in m.gpus]
    build = f"built for CUDA or ROCm {m.torch_cuda}" if m.torch_cuda else "CPU build"
    versions = [
        f"{name} {have}" for name, have in m.versions.items() if have and name in ("transformers", "safetensors")
    ]
    return [
        ["Python", f"{'.'.join(map(str, m.python))}, {m.system}"],
        ["torch", "can't be imported" if m.torch_problem else f"{m.versions.get('torch') or '?'}, {build}"],
        ["packages", ", ".join(versions) or "none"],
        ["GPU", "; ".join(gpus) or "none that torch can use"],
        ["processor", f"{m.processor}; {m.cores} usable core{'s' * (m.cores > 1)}, {m.threads} threads"],
        [
            "number formats",
            f"bfloat16 in hardware ({bf16})" if bf16 else "float32; bfloat16 is emulated" if m.flags else "not known",
        ],
        ["memory", f"{console.size(m.memory)}, {console.size(m.free_memory)} free"],
        ["disk", f"{console.size(m.disk[1])} free in {m.disk[0]}"],
        ["converted models", f"{m.cache[0]}, {console.size(m.cache[1])} free"],
    ]


def target_facts(needed: Needs) -> list[list[str]]:
    """A target's needs as rows of a table."""
    features = needed.features_per_token
    return [
        ["weights", f"{console.size(needed.weights)} ({needed.dtype})"],
        ["longest text", f"{console.count(needed.positions)} tokens"],
        [
            "cache",
            f"{console.size(needed.cache_per_token)} a token, {console.size(2048 * needed.cache_per_token)} for 2,048",
        ],
        [
            "features on disk",
            f"{console.size(features)} a token, {console.size(1000 * SAMPLE_TOKENS * features)} for 1,000 samples of "
            f"{SAMPLE_TOKENS} tokens",
        ],
        ["chat template", "yes" if needed.chat else "none"],
    ]
