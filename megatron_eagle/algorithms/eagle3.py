"""EAGLE-3 (arXiv 2503.01840): ``fc`` of aux hidden states, layers on [embedding ; hidden]."""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.base import UNROLLED, Algorithm


class Eagle3(Algorithm):
    """Reads aux hidden states, has a head of its own over its own vocabulary."""

    name = "eagle3"
    title = "EAGLE-3"
    options = UNROLLED.union(
        {
            "aux_layers",
            "norm_before_fc",
            "norm_before_residual",
            "qk_layernorm",
            "draft_vocab_size",
            "vocab_map",
            "mask_out_of_vocab",
            "offline_features",
            "init_from_base",
            "detach_steps",
        }
    )
    reasons: ClassVar = {
        "mask_token": "drafts its tokens in turn and needs no mask token",
        "regression_weight": "does not regress the hidden state",
    }
