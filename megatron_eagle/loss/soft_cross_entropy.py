"""The loss of all K TTT steps: head, vocab-parallel loss and their gradient in one function.

Logits live one chunk of target positions at a time, for all steps together, and turn in place into
softmax and then gradient. A step's loss feeds nothing in the next, so the statistics of all steps
meet in one all-gather: per position and step a shard's maximum, sum of exp, Σ p z and argmax (16
bytes), per position the teacher's five statistics. Log Z and the soft cross-entropy
log Z - Σ p z follow on every rank, and so does this rank's gradient, w (q - p): backward sends
nothing. Other losses (:mod:`megatron_eagle.loss.registry`) gather one statistic more, or reduce a
second time, because the acceptance alpha = Σ min(p, q) needs log Z first.

Two schedules give the same result:

* :class:`~megatron_eagle.loss.at_once.LossAtOnce` reduces each chunk by itself and makes its
  gradient in forward. Always with one rank, where nothing is sent; with more, one all-gather per
  chunk.
* :class:`~megatron_eagle.loss.kept.LossKept` needs one all-gather per micro-batch, and keeps the
  softmaxes of all chunks for backward, as long as they fit the budgets.

Shape letters: K TTT steps, M target positions of a micro-batch, H hidden size, Dp this rank's shard
of the draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.at_once import LossAtOnce
from megatron_eagle.loss.cross_entropy import SoftCrossEntropy
from megatron_eagle.loss.inputs import Budgets, LossPlan, LossRows, TeacherRows
from megatron_eagle.loss.kept import LossKept
from megatron_eagle.loss.row_loss import RowLoss
from megatron_eagle.loss.sums import LossSums
from megatron_eagle.parallel.products import default_output_bytes


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    rows: LossRows,
    group: ProcessGroup,
    budgets: Budgets,
    loss: RowLoss | None = None,
) -> tuple[Tensor, LossSums, Tensor]:
    """Return the sum of ``loss`` (by default the soft cross-entropy) of ``hidden @ weightᵀ``
    against the teacher.

    Args:
        hidden: [K, M, H], the normed draft hidden of every step at its target positions, full on
            every rank. Its gradient is this rank's partial sum: let it pass through
            ``copy_to_tensor_model_parallel_region`` or a sequence-parallel gather.
        weight: [Dp, H], this rank's rows of the draft's head, without padding.
        teacher: the base's predictions; ``teacher.rows`` is called here, chunk by chunk, and
            nothing of them is computed before.
        rows: masks and weights of the target positions.
        group: the tensor-parallel group that the vocabulary is cut over.
        budgets: memory limits; they decide the schedule and the chunks.
        loss: the loss of one position and step.

    Returns:
        The scalar Σ_t w_t Σ_positions loss, differentiable in hidden and weight, once; the sums
        for the metrics; and the hits [K, M] bool: supervised positions whose draft argmax is the
        base's over the full vocabulary.

    Collectives over ``group``, all in forward: none for one rank; within ``budgets`` one
    all-gather, else one per chunk; as many all-reduces more for a loss that ``needs_overlap``.
    """
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    plan = LossPlan(
        teacher=teacher,
        rows=rows,
        group=group,
        loss=loss or SoftCrossEntropy(),
        gradient=gradient,
        chunk_bytes=budgets.chunk or default_output_bytes(hidden.device),
    )
    keep = gradient and not plan.one_rank and budgets.allow(hidden, teacher.draft_columns)
    schedule = LossKept if keep else LossAtOnce
    total, sums, hits = schedule.apply(hidden, weight, plan)
    return total, LossSums.unpack(sums), hits
