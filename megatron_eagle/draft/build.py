"""Build an EagleDraft beside a base: the one place that does, for training, decoding and checks.

D draft vocabulary, Vp this rank's padded rows of the base's output layer, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.config import DraftSpec
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.layer_config import Rotary, draft_config
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.draft.mtp import MTPDraft
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.parallel.vocab import draft_vocab_shard


def build_draft(
    *,
    spec: DraftSpec,
    num_aux: int,
    base_config: Any,
    backend: LayerBackend,
    vocab_ids: Tensor,
    vocab_size: int,
    base_head: Callable[[], Tensor],
    base_head_rows: int,
    rotary: Rotary,
    metadata: Tensor,
    pg_collection: Any,
    device: torch.device,
    moe_aux_loss_coeff: float = 0.0,
    initialize: bool = True,
) -> EagleDraft:
    """Build the draft of ``spec`` on this rank's ``device``.

    Args:
        num_aux: the number of aux layers.
        base_config: the base's TransformerConfig.
        backend: what the layers are made of.
        vocab_ids: [D] int64, the base ids the draft predicts, of ``vocab_size`` true ids.
        base_head: returns the base's output rows [Vp, H] on this rank; ``base_head_rows`` is Vp.
        metadata: see :mod:`megatron_eagle.draft.metadata`.
        pg_collection: process groups of the draft.
        moe_aux_loss_coeff: weight of a MoE draft's balance loss.
        initialize: random weights from this process's generators; otherwise they are left as they
            are allocated, for a checkpoint to fill.

    No collective.
    """
    config = draft_config(base_config, spec, moe_aux_loss_coeff)
    config.perform_initialization = initialize
    shard = draft_vocab_shard(vocab_ids.numel(), vocab_size, base_head_rows, pg_collection.tp)
    draft = _kind(spec)(
        config=config,
        backend=backend,
        spec=spec,
        num_aux=num_aux,
        vocab_ids=vocab_ids.to(device),
        shard=shard,
        metadata=metadata.to(device),
        pg_collection=pg_collection,
        base_head=base_head,
        rotary=rotary,
    )
    return draft.cuda(device) if device.type == "cuda" else draft


def _kind(spec: DraftSpec) -> type[EagleDraft]:
    if spec.method.is_base_module:
        return MTPDraft
    return BlockDraft if spec.method.drafts_blocks else EagleDraft
