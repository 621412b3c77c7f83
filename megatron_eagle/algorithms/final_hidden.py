"""What drafts share that read the base's final hidden state and use its output layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_eagle.algorithms.base import Algorithm, DraftBlocks

if TYPE_CHECKING:
    from torch import Tensor

_READS_FINAL = "reads the base's final hidden state alone"
_SHARES_HEAD = "shares the base's whole output layer"

REASONS = {
    "aux_layers": _READS_FINAL,
    "norm_before_fc": _READS_FINAL,
    "draft_vocab_size": _SHARES_HEAD,
    "vocab_map": _SHARES_HEAD,
    "mask_out_of_vocab": _SHARES_HEAD,
    "offline_features": "reads no aux layers, and features are those",
}
"""Option -> why such a draft has none."""


class ReadsFinalHidden(Algorithm):
    """Joins the base's final hidden state with the embedding by ``fc``, in every step."""

    reads_final_hidden = True
    joins_by_fc = True
    shares_base_head = True

    def start(self, draft: DraftBlocks, features: Tensor) -> Tensor:
        return features

    def layer_input(self, draft: DraftBlocks, embedding: Tensor, hidden: Tensor) -> Tensor:
        return draft.join_by_fc(embedding, hidden)
