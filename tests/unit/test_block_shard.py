"""The loss of judged rows, taken a few at a time: value and gradient equal autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_eagle.config import EagleConfig
from megatron_eagle.loss import block_shard
from megatron_eagle.loss.block_loss import block_loss
from megatron_eagle.loss.block_plan import BlockPlan
from megatron_eagle.loss.block_rows import BlockRows
from megatron_eagle.loss.inputs import Budgets
from tests.helpers.given_teacher import GivenTeacher
from tests.helpers.one_rank import OneRank

SIZE, WHOLE, TARGETS = 11, 13, 4
ROWS = BlockRows(
    steps=torch.tensor([0, 1, 2, 0, 1, 2, 0]),
    blocks=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
    targets=torch.tensor([0, 1, 2, 1, 2, 3, 3]),
    labels=torch.tensor([1, 12, 3, 4, 0, 10, 11]),  # two of them the draft cannot say
    first_targets=(0, 1, 3),
    counts=(3, 3, 1),
)


def expected(logits: Tensor, whole: Tensor, ce: float, kl: float, l1: float) -> Tensor:
    """The loss of seven rows in plain PyTorch."""
    log_q, p = logits.log_softmax(-1), whole[ROWS.targets]
    inside = p[:, :SIZE]
    outside = torch.cat([log_q.exp(), torch.zeros(len(p), WHOLE - SIZE)], dim=1)
    said = ROWS.labels < SIZE
    hard = -log_q.gather(1, ROWS.labels.clamp(max=SIZE - 1).unsqueeze(1)).squeeze(1) * said
    soft = -(inside / inside.sum(-1, keepdim=True) * log_q).sum(-1)
    alpha = torch.minimum(outside, p).sum(-1)
    weights = torch.tensor([1.0, 0.7788008, 0.6065307])[ROWS.steps]
    return ((ce * hard + kl * soft + l1 * 2 * (1 - alpha)) * weights).sum()


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize(
    "weights", [(0, 1, 0), (0, 0.5, 0), (2, 0, 0), (0, 0, 1), (0.1, 0, 0.9), (0.3, 0.4, 0.5)]
)
def test_equals_autograd(
    weights: tuple[float, float, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_shard, "CACHED_BYTES", 4 * SIZE * rows)
    torch.manual_seed(0)
    whole = torch.randn(TARGETS, WHOLE).softmax(-1)
    logits = torch.randn(7, SIZE, requires_grad=True)
    ce, kl, l1 = weights
    options = EagleConfig.of(
        algorithm="dspark", mask_token=0, block_size=3, position_decay=4.0, confidence_head=False,
        ce_weight=ce, kl_weight=kl, l1_weight=l1,
    ).blocks()  # fmt: skip
    plan = BlockPlan(
        teacher=GivenTeacher(whole, SIZE), rows=ROWS, options=options, steps=3,
        shard_ids=torch.arange(SIZE), in_draft_vocab=torch.arange(WHOLE) < SIZE,
        group=OneRank(), gradient=True, chunk_bytes=1 << 20,  # type: ignore[arg-type]
    )  # fmt: skip
    loss = block_loss(logits, torch.eye(SIZE), None, plan, Budgets(0, 0)).loss
    wanted = expected(logits, whole, ce, kl, l1)
    torch.testing.assert_close(loss, wanted)
    (found,) = torch.autograd.grad(loss, logits)
    (gradient,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)
