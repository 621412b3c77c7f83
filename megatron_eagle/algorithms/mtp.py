"""MTP: the base's own next-token module (DeepSeek-V3, arXiv 2412.19437), used step after step.

It joins the normed embedding and the normed hidden state, runs one layer of the base's kind and a
norm, and predicts by the base's output layer. Servers run such a module from the base's own files.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.base import UNROLLED
from megatron_eagle.algorithms.final_hidden import REASONS, ReadsFinalHidden

_IN_BASE = "is a part of its base's files and not a draft beside them; use <format> hf"


class MTP(ReadsFinalHidden):
    """EAGLE-1 with two norms before ``fc``, a layer of the base's kind, and a norm behind it whose
    output is fed back."""

    name = "mtp"
    title = "MTP"
    options = UNROLLED | {"qk_layernorm", "detach_steps"}
    reasons: ClassVar = {
        **REASONS,
        "norm_before_residual": "has a layer of the base's, with its norm",
        "mask_token": "drafts its tokens in turn and needs no mask token",
        "regression_weight": "does not regress the hidden state",
        "init_from_base": "starts as the base's own module by <warm_start>, which names the base's "
        "Hugging Face directory",
    }

    feeds_back_normed = True
    is_base_module = True

    server_method = "mtp"
    refusals: ClassVar = {
        name: f"an mtp draft {_IN_BASE}" for name in ("vllm", "sglang", "trtllm", "speculators")
    }
