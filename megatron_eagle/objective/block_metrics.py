"""Sum a block draft's metrics on the device until an optimizer step is over; reduce them once.

Shape letters: N blocks, K judged slots, M judged rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.config.block_options import BlockOptions
from megatron_eagle.loss.block_plan import BlockValues
from megatron_eagle.loss.block_rows import BlockRows
from megatron_eagle.objective.metrics import add_up


class BlockSums(NamedTuple):
    """Sums over the judged rows of one micro-batch or more: fp32 [K], or a scalar.

    Between micro-batches and ranks they travel as one vector [4 K + 6], see :meth:`pack`.
    """

    loss: Tensor
    """[K]: the mixed loss of each slot, without the slots' weights."""
    rows: Tensor
    """[K]: judged rows."""
    hits: Tensor
    """[K]: rows whose draft argmax is the base's."""
    prefix_hits: Tensor
    """[K]: rows that hit in this slot and in all slots before."""
    weighted: Tensor
    """Scalar: the loss with the slots' weights."""
    weight: Tensor
    """Scalar: the sum of these weights."""
    blocks: Tensor
    """Scalar: blocks."""
    coverage: Tensor
    """Scalar: the base's probability inside the draft vocabulary, over all rows."""
    expected: Tensor
    """Scalar: tokens per block that sampling is expected to accept, Σ_t Π_{i <= t} alpha_i."""
    confidence: Tensor
    """Scalar: the confidence head's loss with the slots' weights."""

    @classmethod
    def zeros(cls, steps: int, device: torch.device | int) -> Self:
        """Return the sums of no row."""
        return cls.unpack(torch.zeros(4 * steps + 6, device=device))

    def pack(self) -> Tensor:
        """Return the vector [4 K + 6]."""
        return torch.cat([torch.stack(self[:4]).flatten(), torch.stack(self[4:])])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields of a vector [4 K + 6], as views."""
        return cls(*packed[:-6].view(4, -1), *packed[-6:])


def block_sums(rows: BlockRows, values: BlockValues, confidence: Tensor, steps: int) -> Tensor:
    """Return the packed :class:`BlockSums` of a micro-batch. No collective."""
    hits = rows.by_block(values.hits.float(), 0.0, steps)
    ones = torch.ones_like(values.loss)
    return BlockSums(
        loss=rows.by_block(values.loss, 0.0, steps).sum(0),
        rows=rows.by_block(ones, 0.0, steps).sum(0),
        hits=hits.sum(0),
        prefix_hits=hits.cumprod(1).sum(0),
        weighted=(values.loss * values.weight).sum(),
        weight=values.weight.sum(),
        blocks=ones.new_tensor(len(rows.counts)),
        coverage=values.coverage.sum(),
        expected=rows.by_block(values.alpha, 0.0, steps).cumprod(1).sum(),
        confidence=confidence,
    ).pack()


def divisor(sums: BlockSums, options: BlockOptions) -> Tensor:
    """Return what a sum of weighted losses is divided by: the sum of fixed weights over the judged
    rows, or with D-PACE the number of blocks, since its weights depend on the draft."""
    return sums.blocks if options.weights is None else sums.weight


def reduce_block_metrics(
    sums: list[Tensor], options: BlockOptions, groups: Sequence[ProcessGroup]
) -> dict[str, Tensor]:
    """Reduce one optimizer step's metrics from the packed sums of its micro-batches; returns
    scalars on the device.

    ``loss``: the weighted loss over its divisor, the confidence head's included; of each judged
    slot t ``loss_t`` and ``accuracy_t``; ``simulated_accepted_length`` (greedy, on the data's
    text): 1 + the slots that hit before the first miss, per block; with L1 or confidence losses
    ``expected_accepted_length``: the same when tokens are sampled; ``vocab_coverage``: the base's
    probability inside the draft vocabulary; ``supervised_rows`` of slot 0. One all-reduce over each
    of ``groups`` that has more than one rank.
    """
    total = BlockSums.unpack(add_up(sums, groups))
    rows, blocks = total.rows.clamp(min=1), total.blocks.clamp(min=1)
    by = divisor(total, options).clamp(min=torch.finfo(torch.float32).tiny)
    metrics = {"loss": (total.weighted + options.confidence * total.confidence) / by}
    losses, accuracies = total.loss / rows, total.hits / rows
    metrics |= {f"loss_{t}": loss for t, loss in enumerate(losses)}
    metrics |= {f"accuracy_{t}": accuracy for t, accuracy in enumerate(accuracies)}
    metrics["simulated_accepted_length"] = 1 + total.prefix_hits.sum() / blocks
    if options.needs_overlap:
        metrics["expected_accepted_length"] = 1 + total.expected / blocks
    if options.confidence:
        metrics["confidence_loss"] = total.confidence / by
    metrics["vocab_coverage"] = total.coverage / total.rows.sum().clamp(min=1)
    metrics["supervised_rows"] = total.rows[0]
    return metrics
