"""SGLang: its own server, whose answers carry the counts of their requests.

Written for SGLang 0.5.23, not run: it needs a GPU. Its scheduler counts every verification of a
request that has not ended, with all drafts that the verification accepted, before it looks for a
stop token or the token limit (``_resolve_spec_v2_tokens``); the answer has the counts in
``meta_info``. ``/metrics`` has the number of verifications alone, and adds it up after the answer
was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.engine import MODEL_LENGTH, NAME, Answer, Engine


class Sglang(Engine):
    """SGLang's own endpoint, whose answers have token ids and the counts of the request."""

    title = "SGLang"

    @classmethod
    def refusal(cls, *, device: str, method: str, parallel: bool) -> str | None:
        """Return why SGLang cannot serve such a draft on ``device``, naming the flag, or None."""
        if device == "cpu":
            return (
                "--engine sglang needs --device cuda: speculation on a CPU needs AMX there, and a "
                "build of its kernels that no package index has"
            )
        if parallel:
            return "--parallel-drafting: SGLang does not draft in parallel with a P-EAGLE draft"
        if method not in ("eagle3", "eagle"):
            return f"--method {method}: with --engine sglang it is eagle3 or eagle"
        return None

    def command(self, port: int) -> list[str]:
        """Return the words that start the server."""
        setting = self.setting
        words = [
            *(str(setting.python), "-m", "sglang.launch_server"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--model-path", str(setting.base), "--served-model-name", NAME),
            *("--device", setting.device, "--dtype", setting.dtype),
            *("--context-length", str(MODEL_LENGTH)),
            *("--max-running-requests", str(setting.requests), "--random-seed", "0"),
            *("--disable-radix-cache", "--sampling-defaults", "openai"),
        ]
        if setting.dtype == "float32":  # FlashInfer's and FlashAttention's kernels have no fp32
            words += ["--attention-backend", "triton"]
        if setting.draft is None:
            return words
        return [
            *words,
            *("--speculative-algorithm", setting.draft.method.upper()),
            *("--speculative-draft-model-path", str(setting.draft.directory)),
            *("--speculative-num-steps", str(setting.draft.tokens)),
            # SGLang counts the tokens that it verifies: the newest one and the drafts.
            *("--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", str(setting.draft.tokens + 1)),
        ]

    def request(self, prompt: Sequence[int], max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Return a request to ``/generate``."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens}
        return "/generate", {"input_ids": list(prompt), "sampling_params": sampling}

    def answer(self, reply: dict[str, Any]) -> Answer:
        """Return ids and counts of the reply.

        ``spec_correct_drafts_histogram[k]`` is the number of verifications that accepted k drafts;
        a draft at position p was accepted in those with k > p. All are absent where the first
        token ended the answer.

        Raises:
            ValueError: the histogram does not add up to the totals beside it.
        """
        ids, about = list(reply["output_ids"]), reply["meta_info"]
        if self.setting.draft is None:
            return Answer(ids)
        verified = about.get("spec_verify_ct", 0)
        histogram = about.get("spec_correct_drafts_histogram", [])
        accepted = sum(k * count for k, count in enumerate(histogram))
        if (sum(histogram), accepted) != (verified, about.get("spec_num_correct_drafts", 0)):
            raise ValueError(f"SGLang's counts of an answer do not add up: {about}")
        positions = range(self.setting.draft.tokens)
        per_position = {f"accepted_{p}": sum(histogram[p + 1 :]) for p in positions}
        return Answer(ids, {"verifications": verified, **per_position})
