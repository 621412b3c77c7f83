"""Verification of an exported block draft: its files give what the checkpoint's draft gives.

Shapes: S context tokens, B slots, H hidden, A aux layers, Dp the draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle.attention.anchor_plan import Anchor, AnchorPlan
from megatron_eagle.attention.anchors import AnchorState
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.head import VocabParallelHead
from megatron_eagle.hf.draft.plain_block import BlockOutputs, PlainBlockDraft

CONTEXT = 24


@torch.no_grad()
def largest_block_difference(draft: BlockDraft, exported: Path) -> float:
    """Return the largest difference of hidden states, Markov biases and confidences of one block,
    each relative to the largest; and of the head, if the draft stores one.

    Both drafts read the same random context. ``draft``'s weights are rounded to the export's dtype
    already.
    """
    generator = torch.Generator().manual_seed(0)
    width, slots = draft.config.hidden_size, draft.spec.slots
    features = torch.randn(CONTEXT, draft.num_aux * width, generator=generator)
    block = torch.randn(slots, width, generator=generator)
    size = int(draft.vocab_ids[-1]) + 1
    previous = torch.randint(size, (slots,), generator=generator)
    plain = PlainBlockDraft(exported)
    expected = plain.run(features, block, previous)
    found = _run(draft, features, block, previous)
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert len(pairs) == sum(a is not None for a in found)
    if isinstance(draft.lm_head, VocabParallelHead):
        pairs.append((draft.lm_head().float().cpu(), plain.tensors["lm_head.weight"]))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a is not None)


def _run(draft: BlockDraft, features: Tensor, block: Tensor, previous: Tensor) -> BlockOutputs:
    device, slots = draft.vocab_ids.device, draft.spec.slots
    rotary = draft.rotary(CONTEXT + slots).to(device)
    c = draft.context(features.unsqueeze(1).to(device))
    plan = AnchorPlan.of([Anchor(0, 0, CONTEXT - 1)], CONTEXT, window=16)
    state = AnchorState(
        plan.map(lambda x: x.to(device)),
        slots,
        lambda layer: draft.context_key_value(layer, c, rotary[:CONTEXT]),
    )
    hidden = draft.run_blocks(block.unsqueeze(1).to(device), rotary[CONTEXT:], state)[:, 0]
    if draft.markov is None:
        return BlockOutputs(hidden.float().cpu(), None, None)
    embedded = draft.markov.embed(previous.to(device))
    bias = draft.markov(hidden[None], embedded[None])[0] @ draft.markov.output().t()
    confidence = None
    if draft.confidence is not None:
        confidence = draft.confidence(hidden, embedded)[:, 0].float().cpu()
    return BlockOutputs(hidden.float().cpu(), bias.float().cpu(), confidence)
