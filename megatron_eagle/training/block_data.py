"""Micro-batches of a block draft: the data's tokens, and anchors drawn among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.training import get_args

from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError
from megatron_eagle.objective.block_batch import BlockBatch, BlockShape
from megatron_eagle.training.data import next_sample, stored_outputs
from megatron_eagle.training.numbered import SAMPLE


def next_block_batch(iterator: Any, options: EagleConfig, vocab_size: int) -> BlockBatch:
    """Take the iterator's next micro-batch, on the host.

    Raises ``UserError`` as ``next_sample``, and for data that use the mask token: the draft could
    not tell a token from a slot to fill.
    """
    args, spec = get_args(), options.spec
    sample, tokens, multiple, context = next_sample(iterator, vocab_size)
    assert spec.mask_token is not None
    if bool(tokens.eq(spec.mask_token).any()):
        raise UserError(
            f"<mask_token> {spec.mask_token}: the data use this token; choose one that they do not"
        )
    batch = BlockBatch.build(
        tokens,
        sample["loss_mask"],
        sample[SAMPLE].tolist(),
        BlockShape(spec.slots, 0 if spec.method.slot_zero_predicts else 1),
        anchors=options.blocks().anchors,
        seed=args.seed,
        multiple=multiple,
        anchor_multiple=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        context=context,
        positions=sample["positions"] if args.eagle_pack else None,
    )
    if "aux_hidden" not in sample:
        return batch
    return replace(batch, base_outputs=stored_outputs(sample, batch.tokens.shape[1]))
