"""EAGLE-1 (arXiv 2401.15077), and EAGLE-2, the same draft decoded as a tree (2406.16858)."""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.base import UNROLLED
from megatron_eagle.algorithms.final_hidden import REASONS, ReadsFinalHidden


class Eagle1(ReadsFinalHidden):
    """Reads the base's final hidden state, joined with the embedding by ``fc`` in every step."""

    name = "eagle1"
    title = "EAGLE-1"
    options = UNROLLED | {"regression_weight", "detach_steps"}
    reasons: ClassVar = {
        **REASONS,
        "norm_before_residual": "has no norm in front of its first layer",
        "qk_layernorm": "is a Llama layer to its readers, without norms of queries and keys",
        "init_from_base": "reads the base's final hidden state, which no layer of the base reads",
    }

    regresses_hidden = True

    server_method = "eagle"
    architectures: ClassVar = {"vllm": "EagleLlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
    refusals: ClassVar = {
        "hf": "vLLM refuses the fc.bias that SGLang needs of an EAGLE-1 draft",
        "speculators": "the speculators library has no EAGLE-1 of this form",
        "trtllm": "TensorRT-LLM does not load EAGLE-1 drafts",
    }
    served_with_mla = False
    zero_fc_bias = frozenset({"sglang"})
