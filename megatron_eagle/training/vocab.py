"""Which ids a run's draft has: those of the checkpoint it resumes, a given map, or counted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import TRACKER_NAME, BaseInfo
from megatron_eagle.checkpoint.reader import DraftCheckpoint
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.metadata import (
    check_same_draft,
    check_same_experts,
    decode_metadata,
    draft_metadata,
)
from megatron_eagle.draft.vocab import check_vocab_ids, choose_vocab_ids, load_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.import_hf import StoredDraft
from megatron_eagle.training.data import count_supervised, protected_ids


def draft_vocab_ids(
    args: Any, options: EagleConfig, base: BaseInfo, warm_start: StoredDraft | None
) -> Tensor:
    """The draft's base ids [D] int64, ascending; the same on every rank.

    A checkpoint that ``--load`` will resume decides: its rows mean its ids, and rebuilding them
    from other data would scramble the head without a trace in the metrics. So does a warm start.
    """
    captured = options.captured_layers(args.num_layers)
    now = draft_metadata(options, base, captured, 0, args.expert_model_parallel_size)
    resumed = _resumed_vocab_ids(args.load, now, optimizer=not args.no_load_optim)
    if resumed is not None:
        check_vocab_ids(resumed, base.vocab_size, f"--load {args.load}")
        if options.draft_vocab_size not in (None, resumed.numel()):
            raise UserError(
                f"--eagle-draft-vocab-size {options.draft_vocab_size}: the draft in --load "
                f"{args.load} has {resumed.numel()} ids"
            )
        if options.vocab_map is not None:
            given = load_vocab_ids(options.vocab_map, base.vocab_size, resumed.numel())
            if not torch.equal(given, resumed):
                raise UserError(
                    f"--eagle-vocab-map {options.vocab_map}: the draft in --load {args.load} has "
                    "other ids"
                )
        return resumed
    if warm_start is not None:
        return warm_start.vocab_ids
    if options.vocab_map is not None:
        return load_vocab_ids(options.vocab_map, base.vocab_size, options.draft_vocab_size)
    if options.draft_vocab_size in (None, base.vocab_size):
        return torch.arange(base.vocab_size)
    counts = count_supervised(args, options, base)
    always = protected_ids(base.vocab_size, base.hf_config)
    assert options.draft_vocab_size is not None
    return choose_vocab_ids(counts, options.draft_vocab_size, always)


def _resumed_vocab_ids(load: str | None, now: dict[str, Any], optimizer: bool) -> Tensor | None:
    """The ids of the draft in ``load``, checked to be this run's draft, if there is one."""
    if load is None or not (Path(load) / TRACKER_NAME).is_file():
        return None
    source = f"--load {load}"
    saved = DraftCheckpoint.open(load).load(["draft.vocab_ids", "draft.metadata"])
    then = decode_metadata(saved["draft.metadata"], source)
    check_same_draft(then, now, source)
    if optimizer:
        check_same_experts(then, now, source)
    return saved["draft.vocab_ids"]
