"""DFlash (arXiv 2602.06036): a block of tokens in one pass, from the base's hidden states.

A block is the embedding of its anchor, the newest token, and the mask token's embedding in the
other slots; slot k says the token at its own position, k behind the anchor.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.base import Algorithm

BLOCK_OPTIONS = frozenset(
    {
        "aux_layers",
        "draft_vocab_size",
        "vocab_map",
        "offline_features",
        "init_from_base",
        "mask_token",
        "block_size",
        "anchors",
        "position_weights",
        "position_decay",
        "ce_weight",
        "kl_weight",
        "l1_weight",
        "accuracy_target",
    }
)
"""Options of every block draft."""

_NOT_UNROLLED = "drafts a block in one pass and is not unrolled"
_OWN_LOSS = "mixes its losses by <ce_weight>, <kl_weight> and <l1_weight>"


class DFlash(Algorithm):
    """Keys and values of every layer come from the projected aux hidden states before the anchor
    and from the block itself, whose slots see each other. Embedding and head are the base's."""

    name = "dflash"
    title = "DFlash"
    options = BLOCK_OPTIONS
    required = frozenset({"mask_token"})
    reasons: ClassVar = {
        "ttt_steps": f"{_NOT_UNROLLED}; its steps follow from <block_size>",
        "step_decay": f"{_NOT_UNROLLED}; <position_decay> weighs its slots",
        "detach_steps": _NOT_UNROLLED,
        "loss": _OWN_LOSS,
        "attention": "has grouped queries: no server reads a block draft of another attention",
        "num_experts": "has dense layers: no server reads a block draft with experts",
        "norm_before_fc": "has a norm behind fc",
        "qk_layernorm": "norms its queries and keys always",
        "norm_before_residual": "does not read the embedding beside the hidden state",
        "mask_out_of_vocab": "is judged by the data's tokens too",
        "regression_weight": "does not regress the hidden state",
        "markov_head": "drafts all slots at once; dspark has a Markov head",
        "markov_rank": "drafts all slots at once; dspark has a Markov head",
        "confidence_head": "has no confidence head; dspark has one",
        "confidence_weight": "has no confidence head; dspark has one",
    }

    drafts_blocks = True
    shares_base_head = True
    default_layers = 5

    server_method = "dflash"
    architectures: ClassVar = {
        **{name: "DFlashDraftModel" for name in ("hf", "vllm", "sglang")},
        "speculators": "DFlashSpeculator",
    }
    refusals: ClassVar = {"trtllm": "TensorRT-LLM does not load block drafts"}
    served_with_mla = False

    aux_formula = "five between 1 and n - 3 need at least 9"

    def default_aux_layers(self, base_layers: int) -> tuple[int, ...]:
        """Return five layers, evenly spaced from 1 to n - 3; Python rounds halves to even."""
        if base_layers < 9:
            return ()
        return tuple(round(1 + i * (base_layers - 4) / 4) for i in range(5))
