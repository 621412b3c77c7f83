"""EAGLE-1 (arXiv 2401.15077), and EAGLE-2, the same draft decoded as a tree (2406.16858)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_eagle.algorithms.base import UNROLLED, Algorithm, DraftBlocks

if TYPE_CHECKING:
    from torch import Tensor

_READS_FINAL = "reads the base's final hidden state alone"
_SHARES_HEAD = "shares the base's whole output layer"


class Eagle1(Algorithm):
    """Reads the base's final hidden state, joined with the embedding by ``fc`` in every step."""

    name = "eagle1"
    title = "EAGLE-1"
    options = UNROLLED | {"regression_weight", "detach_steps"}
    reasons: ClassVar = {
        "aux_layers": _READS_FINAL,
        "norm_before_fc": _READS_FINAL,
        "norm_before_residual": "has no norm in front of its first layer",
        "qk_layernorm": "is a Llama layer to its readers, without norms of queries and keys",
        "draft_vocab_size": _SHARES_HEAD,
        "vocab_map": _SHARES_HEAD,
        "mask_out_of_vocab": _SHARES_HEAD,
        "offline_features": "reads no aux layers, and features are those",
        "init_from_base": "reads the base's final hidden state, which no layer of the base reads",
    }

    reads_final_hidden = True
    joins_by_fc = True
    shares_base_head = True
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

    def start(self, draft: DraftBlocks, features: Tensor) -> Tensor:
        return features

    def layer_input(self, draft: DraftBlocks, embedding: Tensor, hidden: Tensor) -> Tensor:
        return draft.join_by_fc(embedding, hidden)
