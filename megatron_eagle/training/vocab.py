"""Which ids a run's draft has: those of the checkpoint it resumes, a given map, or counted ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.metadata import (
    check_same_draft,
    check_same_experts,
    decode_metadata,
    resolved_spec,
    run_metadata,
)
from megatron_eagle.draft.vocab import check_vocab_ids, choose_vocab_ids, load_vocab_ids
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.training.data import count_supervised, protected_ids
from megatron_eagle.training.resume import check_resume, resumed_checkpoint
from megatron_eagle.user_files import naming, reading


def draft_vocab_ids(
    args: Any, options: EagleConfig, base: BaseInfo, warm_start: StoredDraft | None
) -> Tensor:
    """Choose the draft's base ids [D] int64, ascending; the same on every rank.

    A checkpoint that ``--load`` will resume decides: its rows mean its ids, and rebuilding them
    from other data would scramble the head without a trace in the metrics. So does a warm start.
    """
    aux_layers = options.spec.aux_layers_of(base.megatron_args["num_layers"])
    spec = resolved_spec(options.spec, base, aux_layers, base.vocab_size)
    now = run_metadata(options, base, spec, args.expert_model_parallel_size)
    size, vocab_map = options.spec.draft_vocab_size, options.train.vocab_map
    resumed = _resumed_vocab_ids(args, now)
    if resumed is not None:
        check_vocab_ids(resumed, base.vocab_size, f"<load> {args.load}")
        if size not in (None, resumed.numel()):
            raise UserError(
                f"<draft_vocab_size> {size}: the draft in <load> {args.load} has "
                f"{resumed.numel()} ids"
            )
        if vocab_map is not None:
            mapped = load_vocab_ids(vocab_map, base.vocab_size, resumed.numel())
            if not torch.equal(mapped, resumed):
                raise UserError(
                    f"<vocab_map> {vocab_map}: the draft in <load> {args.load} has other ids"
                )
        return resumed
    if warm_start is not None:
        return warm_start.vocab_ids
    if vocab_map is not None:
        return load_vocab_ids(vocab_map, base.vocab_size, size)
    if size is None or size == base.vocab_size:
        return torch.arange(base.vocab_size)
    counts = count_supervised(args, options, base)
    return choose_vocab_ids(counts, size, protected_ids(base.vocab_size, base.hf_config))


def _resumed_vocab_ids(args: Any, now: dict[str, Any]) -> Tensor | None:
    """Read the ids of the draft that ``args.load`` resumes, if there is one, and check that it is
    this run's and can be gone on with."""
    checkpoint = resumed_checkpoint(args)
    if checkpoint is None:
        return None
    source = f"<load> {literal(args.load)}"
    with naming("load"), reading("load", args.load):
        saved = checkpoint.load(["draft.vocab_ids", "draft.metadata"])
        then = decode_metadata(saved["draft.metadata"], source)
        check_same_draft(then, now, source)
        if not args.no_load_optim:
            check_same_experts(then, now, source)
        check_resume(args, checkpoint)
        return saved["draft.vocab_ids"]
