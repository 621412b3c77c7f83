"""EAGLE-3.1 (arXiv 2605.09992): a norm for each aux layer, and the normed output is fed back."""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.eagle3 import Eagle3


class Eagle31(Eagle3):
    """EAGLE-3 with two norms placed otherwise."""

    name = "eagle3.1"
    title = "EAGLE-3.1"
    options = Eagle3.options - {"norm_before_fc"}
    reasons: ClassVar = {
        **Eagle3.reasons,
        "norm_before_fc": "has a norm for each aux layer there already",
    }

    norms_each_aux_layer = True
    feeds_back_normed = True
