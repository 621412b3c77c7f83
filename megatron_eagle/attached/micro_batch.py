"""Read a trainer's micro-batch: its loss mask, its packed documents, its part of the sequence.

B micro-batch, S sequence, of which a rank's trainer has S / CP tokens, K TTT steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attached.capture import CapturedForward
from megatron_eagle.errors import UserError
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.context import ContextShard, gather_sequence

_SUPERVISED, _START, _WEIGHTED = 1, 2, 4
"""Bits of a token's mark: supervised; first of its document; weighted by another number than 1."""


def read_micro_batch(
    captured: CapturedForward,
    loss_mask: Tensor,
    steps: int,
    cp_group: ProcessGroup,
    *,
    parts: int = 1,
    every_row: bool = False,
) -> EagleBatch:
    """Return the batch of a captured forward on the device of its tokens.

    ``loss_mask`` [B, S / CP] on any device is that of the model's own loss: entry i says by 0 or 1
    whether the token after position i is supervised. Documents come from ``packed_seq_params``, or
    from ``position_ids`` that begin anew inside a sequence. ``parts`` and ``every_row`` go to
    ``EagleBatch.build``. Under context parallelism one all-gather over ``cp_group``. The device is
    asked once per micro-batch.

    Raises ``UserError`` for a mask of another shape or with other numbers, for packed sequences
    under context parallelism, and for sequences too short for ``steps``.
    """
    if captured.other_inputs:
        raise UserError("decoder_input: the draft knows no embeddings but those of input_ids")
    tokens = captured.tokens
    marks = _marks(captured, loss_mask, cp_group)
    if cp_group.size() > 1:
        both = torch.stack([tokens.t(), marks.t().to(tokens.dtype)], dim=-1)
        tokens, marks = (x.t() for x in gather_sequence(both, cp_group).unbind(-1))
    marks = marks.cpu()
    if bool((marks & _WEIGHTED).any()):
        raise UserError("<loss_mask> holds weights: a draft's tokens are supervised or not, 1 or 0")
    _check_length(tokens.shape[1], steps, cp_group.size())
    return EagleBatch.build(
        tokens.contiguous(),
        (marks & _SUPERVISED).float(),
        steps,
        parts=parts,
        every_row=every_row,
        context=(cp_group.rank(), cp_group.size()),
        positions=_positions(marks & _START > 0),
    ).to(tokens.device)


def _marks(captured: CapturedForward, loss_mask: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Return the bits of this rank's tokens, int64 [B, S / CP]."""
    tokens = captured.tokens
    if loss_mask.shape != tokens.shape:
        raise UserError(
            f"<loss_mask> has shape {list(loss_mask.shape)}, the model's input_ids "
            f"{list(tokens.shape)}"
        )
    mask = loss_mask.to(tokens.device)
    weighted = (mask != 0) & (mask != 1)
    starts = _document_starts(captured, cp_group)
    return (mask > 0) * _SUPERVISED + starts * _START + weighted * _WEIGHTED


def _document_starts(captured: CapturedForward, cp_group: ProcessGroup) -> Tensor:
    """Return whether each of this rank's tokens begins a document, bool [B, S / CP]."""
    tokens, packed = captured.tokens, captured.packed_seq_params
    if packed is not None:
        if cp_group.size() > 1:
            raise UserError(
                f"<context_parallel_size> {cp_group.size()} with packed_seq_params: Megatron cuts "
                "every document over the ranks, the draft whole sequences; pack with position_ids "
                "that restart, or without context parallelism"
            )
        bounds = packed.cu_seqlens_q_padded
        bounds = (packed.cu_seqlens_q if bounds is None else bounds).long()
        # The last bound lies behind the last token; what is beyond it belongs to no document.
        marked = tokens.new_zeros(tokens.numel() + 1).index_fill_(0, bounds.to(tokens.device), 1)
        return marked[:-1].view_as(tokens) > 0
    if captured.position_ids is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (captured.position_ids == 0).expand_as(tokens)


def _positions(starts: Tensor) -> Tensor | None:
    """Return the position [B, S] of every token in its document, or None for one document."""
    if not bool(starts[:, 1:].any()):
        return None
    index = torch.arange(starts.shape[1]).expand_as(starts)
    return index - (index * starts).cummax(dim=1).values


def _check_length(length: int, steps: int, world: int) -> None:
    if length < steps + 2:
        raise UserError(
            f"sequences of {length} tokens: <ttt_steps> {steps} needs at least {steps + 2}"
        )
    if world > 1:
        start, stop = ContextShard(length, 0, world).spans[0]
        if stop - start < steps:
            raise UserError(
                f"sequences of {length} tokens: each of the {2 * world} pieces that context "
                f"parallelism cuts them into needs at least <ttt_steps> {steps} tokens"
            )
