"""The exact commands that serve an exported folder. The method is always named: vLLM otherwise guesses it from the
path.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from draftsmith.export.checkpoint import Extras, Serving, TargetCard


def commands(server: str, kind: str, target: TargetCard, folder: Path, extras: Extras) -> tuple[str, ...]:
    """Shell commands (or Python, for transformers) for a drafter.

    Args:
        server: `vllm`, `sglang`, `speculators`, `transformers` or `gguf`.
        kind: `eagle`, `eagle3` or `standalone`.
        folder: where it is, unless `extras` says where it will be published.
    """
    numbers, published = extras.serving, extras.published_as
    if published:
        folder = Path(published)
    if server == "vllm":
        return (_vllm(kind, target, folder, numbers),)
    if server == "speculators":
        return (_vllm(kind, target, folder, numbers), f"vllm serve {shlex.quote(str(folder))}")
    if server == "sglang":
        return (_sglang(kind, target, folder, numbers),)
    if server == "gguf":
        if published:
            fetch = f"hf download {shlex.quote(published)} --local-dir {shlex.quote(folder.name)}"
            return (fetch, *_llama_cpp(kind, target, Path(folder.name), numbers))
        return _llama_cpp(kind, target, folder, numbers)
    return (_transformers(target, folder, numbers),)


def _vllm(kind: str, target: TargetCard, folder: Path, numbers: Serving) -> str:
    method = {"standalone": "draft_model"}.get(kind, kind)
    config = {"method": method, "model": str(folder), "num_speculative_tokens": numbers.tokens}
    return (
        f"vllm serve {shlex.quote(target.name)} --speculative-config "
        f"{shlex.quote(json.dumps(config, ensure_ascii=False))}"
    )


def _sglang(kind: str, target: TargetCard, folder: Path, numbers: Serving) -> str:
    algorithm = {"eagle": "EAGLE", "eagle3": "EAGLE3", "standalone": "STANDALONE"}[kind]
    # With one child a node the tree is a chain, and SGLang wants its length to be steps + 1.
    nodes = numbers.depth if numbers.top_k == 1 else numbers.nodes
    parts = [
        "python -m sglang.launch_server",
        f"--model-path {shlex.quote(target.name)}",
        f"--speculative-algorithm {algorithm}",
        f"--speculative-draft-model-path {shlex.quote(str(folder))}",
        f"--speculative-num-steps {numbers.depth}",
        f"--speculative-eagle-topk {numbers.top_k}",
        f"--speculative-num-draft-tokens {nodes + 1}",
    ]
    return " ".join(parts)


def _llama_cpp(kind: str, target: TargetCard, folder: Path, numbers: Serving) -> tuple[str, ...]:
    out = f"{folder.name}.gguf"
    convert = f"python convert_hf_to_gguf.py {shlex.quote(str(folder))}"
    if kind == "eagle3":
        convert += f" --target-model-dir {shlex.quote(target.name)}"
    spec = {"eagle3": "draft-eagle3", "standalone": "draft-simple"}[kind]
    serve = f"llama-server -m TARGET.gguf -md {shlex.quote(out)} --spec-type {spec} --spec-draft-n-max {numbers.tokens}"
    return f"{convert} --outtype f16 --outfile {shlex.quote(out)}", serve


def _transformers(target: TargetCard, folder: Path, numbers: Serving) -> str:
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({target.name!r})",
            f"target = AutoModelForCausalLM.from_pretrained({target.name!r})",
            f"draft = AutoModelForCausalLM.from_pretrained({str(folder)!r})",
            f"draft.generation_config.num_assistant_tokens = {numbers.tokens}",
            'draft.generation_config.num_assistant_tokens_schedule = "constant"',
            "draft.generation_config.assistant_confidence_threshold = 0.0",
            'inputs = tokenizer("The capital of France is", return_tensors="pt")',
            "print(tokenizer.decode(target.generate(**inputs, assistant_model=draft, do_sample=False)[0]))",
        ]
    )
