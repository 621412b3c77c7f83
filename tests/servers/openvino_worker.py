"""Runs in OpenVINO's environment: exports base and drafts, and decodes with OpenVINO GenAI.

    python openvino_worker.py JOBS.json RESULTS.json

A job is {"base": DIR, "draft": DIR or null, "card": commands of the model card's paragraph on
OpenVINO, "prompts": [ids], "max_tokens": N, "draft_tokens": N, "stop_ids": [id]}; its result
{"answers": [ids], "verifications": N}, or {"error": text}. The draft is converted by the very
commands of the card. Nothing of this project is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jobs import work

BIN = Path(sys.executable).parent
PLAIN: dict[Path, list[list[int]]] = {}
"""Base -> its own greedy answers."""
PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def converted(base: str, draft: str, folder: Path, commands: list[str]) -> tuple[Path, Path]:
    """Run the card's commands, weights kept in fp32; the two models: the draft's in ``folder``, the
    base's beside it, where further drafts find it."""
    ov_base = folder.with_name(f"base_{Path(base).parent.name}")
    ov_draft = folder / "draft"
    names = {"OV_BASE": ov_base, "OV_DRAFT": ov_draft, "BASE": base, "DRAFT": draft}
    for command in commands:
        if "-m BASE" in command and ov_base.exists():
            continue
        words = command
        for name, path in names.items():
            words = words.replace(f" {name}", f" {path}")
        if words.startswith("optimum-cli"):
            words = f"{BIN}/{words} --weight-format fp32"
        done = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return ov_base, ov_draft


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    import openvino as ov
    import openvino_genai as genai

    base, draft = converted(job["base"], job["draft"], folder, job["card"])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = False
    answers: dict[bool, list[list[int]]] = {False: PLAIN.get(base, [])}
    verifications = 0
    for drafts in (True,) if answers[False] else (False, True):
        extra = {"draft_model": genai.draft_model(str(draft), "CPU", **PRECISION)} if drafts else {}
        pipe = genai.LLMPipeline(str(base), "CPU", scheduler_config=scheduler, **PRECISION, **extra)
        config = genai.GenerationConfig()
        config.max_new_tokens = job["max_tokens"]
        config.do_sample = False
        config.eos_token_id = job["stop_ids"][0]
        config.stop_token_ids = set(job["stop_ids"])
        config.apply_chat_template = False
        if drafts:
            config.num_assistant_tokens = job["draft_tokens"]
        answers[drafts] = []
        for ids in job["prompts"]:
            rows = np.array([ids], dtype=np.int64)
            inputs = genai.TokenizedInputs(ov.Tensor(rows), ov.Tensor(np.ones_like(rows)))
            result = pipe.generate(inputs, config)
            answers[drafts].append([int(token) for token in result.tokens[0]])
            metrics = result.extended_perf_metrics
            if drafts and metrics:  # the prefill is an iteration of the base too
                durations = metrics.main_model_metrics.raw_metrics.m_durations
                verifications += len(durations) - 1
        del pipe
    PLAIN[base] = answers[False]
    return {"plain": answers[False], "answers": answers[True], "verifications": verifications}


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return work(run)


if __name__ == "__main__":
    sys.exit(main())
