"""MTP: the base's own next-token module (DeepSeek-V3, arXiv 2412.19437), used step after step.

It joins the normed embedding and the normed hidden state, runs one layer of the base's kind and a
norm, and predicts by the base's output layer. Servers run such a module from the base's own files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_eagle.algorithms.base import UNROLLED, Algorithm, DraftBlocks

if TYPE_CHECKING:
    from torch import Tensor

_READS_FINAL = "reads the base's final hidden state alone"
_SHARES_HEAD = "shares the base's whole output layer"
_IN_BASE = "is a part of its base's files and not a draft beside them; use <format> hf"


class MTP(Algorithm):
    """EAGLE-1 with two norms before ``fc``, a layer of the base's kind, and a norm behind it whose
    output is fed back."""

    name = "mtp"
    title = "MTP"
    options = UNROLLED | {"qk_layernorm", "detach_steps"}
    reasons: ClassVar = {
        "aux_layers": _READS_FINAL,
        "norm_before_fc": _READS_FINAL,
        "norm_before_residual": "has a layer of the base's, with its norm",
        "draft_vocab_size": _SHARES_HEAD,
        "vocab_map": _SHARES_HEAD,
        "mask_out_of_vocab": _SHARES_HEAD,
        "offline_features": "reads no aux layers, and features are those",
        "mask_token": "drafts its tokens in turn and needs no mask token",
        "regression_weight": "does not regress the hidden state",
        "init_from_base": "starts as the base's own module by <warm_start>, which names the base's "
        "Hugging Face directory",
    }

    reads_final_hidden = True
    joins_by_fc = True
    shares_base_head = True
    feeds_back_normed = True
    is_base_module = True

    server_method = "mtp"
    refusals: ClassVar = {
        name: f"an mtp draft {_IN_BASE}" for name in ("vllm", "sglang", "trtllm", "speculators")
    }

    def start(self, draft: DraftBlocks, features: Tensor) -> Tensor:
        return features

    def layer_input(self, draft: DraftBlocks, embedding: Tensor, hidden: Tensor) -> Tensor:
        return draft.join_by_fc(embedding, hidden)
