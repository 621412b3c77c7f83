"""Logits of a saved draft, computed by its Megatron modules on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model
from tests.reference.layers import ReferenceConfig


def draft_logits(
    checkpoint: Path, embedding: Tensor, tokens: Tensor, features: Tensor, steps: int
) -> Tensor:
    """[K, B, S, D] of the draft in ``checkpoint``, loaded at TP 2 with Megatron's own loader."""
    shards = run_distributed(_logits, 2, str(checkpoint), embedding, tokens, features, steps)
    return torch.cat(shards, dim=-1)


def _logits(
    rank: int,
    world: int,
    checkpoint: str,
    embedding: Tensor,
    tokens: Tensor,
    features: Tensor,
    steps: int,
) -> Tensor:
    megatron_parallel(tp=world)
    from megatron.core import dist_checkpointing

    from megatron_eagle.checkpoint.directory import resolve_checkpoint
    from megatron_eagle.checkpoint.reader import CheckpointReader
    from megatron_eagle.objective.batch import EagleBatch
    from megatron_eagle.objective.inputs import DraftInputs
    from megatron_eagle.objective.unroll import step_outputs

    ids = CheckpointReader.open(checkpoint).load(["draft.vocab_ids"])["draft.vocab_ids"]
    model = build_model(_blank_case(embedding, tokens, features, ids, steps))
    sharded = {"model": model.sharded_state_dict()}
    state = dist_checkpointing.load(sharded, str(resolve_checkpoint(checkpoint)))
    model.load_state_dict(state["model"], strict=False)
    with torch.no_grad():
        rows = features.transpose(0, 1).contiguous()
        batch = EagleBatch.build(tokens, torch.zeros(tokens.shape), steps, every_row=True)
        inputs = DraftInputs.of(model.base, model.draft, batch, rows, steps=steps)
        outputs = step_outputs(model.draft, inputs)
        logits = [hidden @ model.draft.lm_head().t() for hidden in outputs]
    # All rows are live, so they keep their places, [S, B].
    return torch.stack(logits).view(steps, *tokens.t().shape, -1).transpose(1, 2)


def _blank_case(
    embedding: Tensor, tokens: Tensor, features: Tensor, ids: Tensor, steps: int
) -> Any:
    hidden = embedding.shape[1]
    config = ReferenceConfig(
        hidden_size=hidden, target_hidden_size=hidden, intermediate_size=80, num_heads=8,
        num_kv_heads=4, head_dim=8, vocab_size=embedding.shape[0], draft_vocab_size=ids.numel(),
        num_layers=1, num_aux=3, rope_theta=10000.0, rms_eps=1e-5, ttt_steps=steps,
        step_decay=0.8, mask_out_of_vocab=False, detach_steps=False,
    )  # fmt: skip
    from tests.reference.eagle3 import ReferenceEagle3

    weights = ReferenceEagle3(config, embedding, ids).state_dict()
    zeros = torch.zeros(*tokens.shape, hidden)
    return Case(
        config, weights, ids, embedding, embedding, features, zeros, tokens, torch.ones(2, 12)
    )
