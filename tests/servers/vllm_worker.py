"""Runs in vLLM's environment: its real engine on a list of jobs, greedy answers and counters.

    python vllm_worker.py JOBS.json RESULTS.json

A job is {"base": DIR, "speculative": vLLM's speculative configuration or null, "prompts": [ids],
"max_tokens": N, "stop_ids": [id], "requests": N decoded together at most}; its result
{"answers": [ids], "verifications": N, "accepted": [N]}, or {"error": text}. Loaded one after
another in this process, in fp32. Nothing of this project is imported.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

from jobs import work

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}
PREFIX = "vllm:spec_decode_num_"


def counters(llm: Any) -> dict[str, Any]:
    """Verifications, and accepted drafts per position, since the engine started."""
    values = {
        metric.name: list(metric.values) if hasattr(metric, "values") else metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(PREFIX)
    }
    return {
        "verifications": int(values.get(f"{PREFIX}drafts", 0)),
        "accepted": [int(count) for count in values.get(f"{PREFIX}accepted_tokens_per_pos", [])],
    }


def run(job: dict[str, Any], _: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=job["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=job["requests"],
        seed=0,
        speculative_config=job["speculative"],
        disable_log_stats=False,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    try:
        before = counters(llm)
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]],
            SamplingParams(
                temperature=0.0,
                max_tokens=job["max_tokens"],
                detokenize=False,
                stop_token_ids=job["stop_ids"],
            ),
            use_tqdm=False,
        )
        after = counters(llm)
        earlier = before["accepted"] or [0] * len(after["accepted"])
        return {
            "answers": [list(output.outputs[0].token_ids) for output in outputs],
            "verifications": after["verifications"] - before["verifications"],
            "accepted": [b - a for a, b in zip(earlier, after["accepted"], strict=True)],
        }
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> int:
    return work(run)


if __name__ == "__main__":
    sys.exit(main())
