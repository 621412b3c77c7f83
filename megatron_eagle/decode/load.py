"""Base and draft from their checkpoints, at this run's tensor parallelism, without the trainer.

fp32, modules of Megatron-Core alone, no sequence parallelism: what decoding checks is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_eagle.attention.backend import local_backend
from megatron_eagle.attention.latent import position_rotary
from megatron_eagle.checkpoint_dir import BaseInfo
from megatron_eagle.compat import dist_checkpointing
from megatron_eagle.draft.layer_config import Rotary, draft_config, draft_rotary
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.hf.dcp_reader import DraftCheckpoint
from megatron_eagle.hf.draft_info import BASE_SIZES, DraftInfo, parse_draft_info
from megatron_eagle.teacher.base import FrozenBase, output_rows
from megatron_eagle.teacher.build import base_config, build_base, reason_of
from megatron_eagle.teacher.build import load_base as load_base_weights
from megatron_eagle.teacher.targets import draft_vocab_shard


@dataclass(frozen=True)
class DraftCheckpointInfo:
    """What a draft's checkpoint says of it: ``vocab_ids`` [D], ``metadata`` as saved."""

    info: DraftInfo
    vocab_ids: Tensor
    metadata: Tensor


def load_base(directory: str | Path, base: BaseInfo, pg_collection: Any) -> Any:
    """The base's GPTModel with its weights, in eval mode, no gradients. A collective of all ranks.

    Raises ``ValueError`` when the ranks do not divide its heads, or naming the directory when it
    cannot be loaded.
    """
    ranks = pg_collection.tp.size()
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if base.megatron_args[name] % ranks:
            raise ValueError(
                f"--nproc-per-node {ranks} does not divide the base's {name} = "
                f"{base.megatron_args[name]}"
            )
    config = base_config(base, ranks)
    config.perform_initialization = False
    gpt = build_base(config, base, local_backend(), pg_collection)
    try:
        load_base_weights(gpt, directory)
    except ValueError as error:
        raise ValueError(str(error).replace("--eagle-base-checkpoint", "--base")) from error
    return gpt.cuda(torch.cuda.current_device()).requires_grad_(False).eval()


def read_draft(directory: str | Path, source: str) -> DraftCheckpointInfo:
    """What the draft in ``directory`` (or one of its iterations) says; ``ValueError``s start with
    ``source``."""
    keys = ("draft.metadata", "draft.vocab_ids")
    tensors = DraftCheckpoint.open(directory).load(keys)
    metadata, vocab_ids = (tensors[key] for key in keys)
    info = parse_draft_info(metadata, source)
    check_vocab_ids(vocab_ids, info.base.vocab_size, source)
    return DraftCheckpointInfo(info, vocab_ids, metadata)


def read_draft_info(directory: str | Path, base: BaseInfo) -> DraftCheckpointInfo:
    """Raises ``ValueError`` when the draft was trained for a base of other dimensions."""
    source = f"--draft {directory}"
    about = read_draft(directory, source)
    for name in (*BASE_SIZES, "vocab_size"):
        trained, given = about.info.base.megatron_args[name], base.megatron_args[name]
        if trained != given:
            raise ValueError(
                f"{source}: trained for a base with {name} = {trained}, --base has {given}"
            )
    return about


def fresh_draft(about: DraftCheckpointInfo, gpt: Any) -> EagleDraft:
    """A draft of the checkpoint's shape and vocabulary as training starts it: random weights from
    this process's generators, captured layers scaled to one size."""
    draft = _build(about, gpt, initialize=True)
    base = FrozenBase(gpt, about.info.aux_layers, about.info.base.vocab_size)
    draft.start_evenly(base.layer_sizes)
    return draft


def load_draft(about: DraftCheckpointInfo, gpt: Any, directory: str | Path) -> EagleDraft:
    """The draft that training saved, whatever layout it was trained in. A collective of all ranks.

    Raises ``ValueError`` naming the directory when it cannot be loaded.
    """
    return restore(_build(about, gpt, initialize=False), directory)


def restore(draft: EagleDraft, directory: str | Path) -> EagleDraft:
    """``draft`` with the weights of the checkpoint in ``directory``; strict, a collective."""
    path = DraftCheckpoint.open(directory).directory
    try:
        state = dist_checkpointing.load(draft.sharded_state_dict(prefix="draft."), str(path))
    except (Exception, CheckpointException) as error:  # readers fail in many ways
        raise ValueError(f"--draft {directory}: cannot be loaded: {reason_of(error)}") from error
    own = {key.removeprefix("draft."): value for key, value in state.items()}
    missing, _ = draft.load_state_dict(own, strict=False)
    lacking = [key for key in missing if not key.endswith("_extra_state")]
    if lacking:
        raise ValueError(f"--draft {directory}: lacks {lacking[0]}")
    return draft


def _build(about: DraftCheckpointInfo, gpt: Any, initialize: bool) -> EagleDraft:
    embedding, options = gpt.embedding.word_embeddings.weight, about.info.options
    return build_draft(
        about,
        gpt.config,
        gpt.pg_collection,
        embedding.shape[0],
        base_head=lambda: output_rows(gpt),
        rotary=draft_rotary(position_rotary(gpt), about.info.base, options, embedding.device),
        initialize=initialize,
    )


def build_draft(
    about: DraftCheckpointInfo,
    base_config: Any,
    pg_collection: Any,
    base_rows: int,
    base_head: Callable[[], Tensor],
    rotary: Rotary,
    initialize: bool,
) -> EagleDraft:
    """A draft of the checkpoint's shape, frozen, on this rank's device. ``base_config`` is the
    base's TransformerConfig, ``base_rows`` the padded height of its output layer on a rank."""
    options = about.info.options
    config = draft_config(base_config, options)
    config.perform_initialization = initialize
    device = torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    shard = draft_vocab_shard(
        about.vocab_ids.numel(), about.info.base.vocab_size, base_rows, pg_collection.tp
    )
    draft = EagleDraft(
        config,
        local_backend(),
        options,
        len(about.info.aux_layers),
        about.vocab_ids.to(device),
        shard,
        about.metadata.to(device),
        pg_collection,
        base_head,
        rotary,
    )
    return draft.cuda(torch.cuda.current_device()).requires_grad_(False).eval()
