"""DSpark (arXiv 2607.05147): DFlash whose slots say the next token, with a Markov head.

Slot k says the token k + 1 behind the anchor. The Markov head adds to its logits what the token
before says of the next one, and the confidence head how likely the slot is accepted.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.dflash import BLOCK_OPTIONS, DFlash

_HEADS = ("markov_head", "markov_rank", "confidence_head", "confidence_weight")


class DSpark(DFlash):
    """DFlash with two heads more, whose drafts are chosen from left to right."""

    name = "dspark"
    title = "DSpark"
    options = BLOCK_OPTIONS | set(_HEADS)
    reasons: ClassVar = {name: why for name, why in DFlash.reasons.items() if name not in _HEADS}

    slot_zero_predicts = True

    server_method = "dspark"
    architectures: ClassVar = {
        **{name: "Qwen3DSparkModel" for name in ("hf", "vllm", "sglang")},
        "speculators": "DSparkSpeculator",
    }
