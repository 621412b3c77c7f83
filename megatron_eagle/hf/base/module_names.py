"""The names of a base's own next-token module (MTP) in its Hugging Face files, by family.

Read in the servers' model files and in published checkpoints' indices. The layer inside the module
has the names of the base's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

COUNT = "num_nextn_predict_layers"


@dataclass(frozen=True)
class ModuleNames:
    """Where the tensors of a next-token module are.

    ``prefix`` is in front of all of them, "{}" its number: counted on from the base's layers
    (``counts_on``) or from 0. ``layer`` is in front of the names of its layer. ``counted_by``: the
    field of config.json that says how many modules there are; ``count``: how many where it does
    not. ``hidden_first``: the matrix that joins both reads [hidden ; embedding], where others read
    [embedding ; hidden].
    ``copies`` maps tensors of the module that repeat a tensor of the base to that tensor's name.
    ``vllm_differs``: what vLLM 0.33.0 computes otherwise than a module was trained for here; empty
    if nothing.
    """

    prefix: str
    embedding_norm: str
    hidden_norm: str
    joining: str
    final_norm: str
    layer: str = ""
    counted_by: str = COUNT
    count: int = 0
    counts_on: bool = True
    hidden_first: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    vllm_differs: str = ""

    def count_in(self, config: Mapping[str, Any]) -> Any:
        """Return the number of modules that a config.json says, as it is there."""
        value = config.get(self.counted_by)
        return self.count if value is None else value

    def prefixes(self, base_layers: int, count: int) -> tuple[str, ...]:
        """Return the prefixes of ``count`` modules of a base of ``base_layers`` layers."""
        first = base_layers if self.counts_on else 0
        return tuple(self.prefix.format(number) for number in range(first, first + count))


DEEPSEEK = ModuleNames(
    prefix="model.layers.{}.",
    embedding_norm="enorm.weight",
    hidden_norm="hnorm.weight",
    joining="eh_proj.weight",
    final_norm="shared_head.norm.weight",
    copies={
        "embed_tokens.weight": "model.embed_tokens.weight",
        "shared_head.head.weight": "lm_head.weight",
    },
)
"""DeepSeek-V3 and -R1, and Kimi-K2's architecture."""

GLM = replace(DEEPSEEK, vllm_differs="feeds back the output before the module's norm, not after it")
"""GLM-4.5."""

MIMO = ModuleNames(
    prefix="model.mtp_layers.{}.",
    embedding_norm="token_layernorm.weight",
    hidden_norm="hidden_layernorm.weight",
    joining="input_proj.weight",
    final_norm="final_layernorm.weight",
    counts_on=False,
    hidden_first=True,
    vllm_differs="gives the module the base's state before its final norm, and drafts one token",
)

QWEN3_NEXT = ModuleNames(
    prefix="mtp.",
    embedding_norm="pre_fc_norm_embedding.weight",
    hidden_norm="pre_fc_norm_hidden.weight",
    joining="fc.weight",
    final_norm="norm.weight",
    layer="layers.0.",
    count=1,
    counts_on=False,
)
"""Qwen3-Next, whose config.json does not mention the module that its files hold."""

QWEN3_5 = replace(QWEN3_NEXT, counted_by="mtp_num_hidden_layers")
"""Qwen3.5."""
