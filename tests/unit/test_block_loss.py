"""Numbers worked out by hand: D-PACE, normalizers, L1, acceptance and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.config import EagleConfig
from megatron_eagle.loss.block_plan import BlockPlan
from megatron_eagle.loss.block_rows import BlockRows, d_pace
from tests.helpers.given_teacher import GivenTeacher
from tests.helpers.one_rank import OneRank


def options(**fields: Any) -> Any:
    return EagleConfig.of(algorithm="dspark", mask_token=0, block_size=3, **fields).blocks()


def score(q: list[float], p: list[float], label: int, **fields: Any) -> tuple[Any, Tensor]:
    """Result and gradient on the logits of one row whose draft distribution is ``q``."""
    from megatron_eagle.loss.block_loss import block_loss
    from megatron_eagle.loss.inputs import Budgets

    one = torch.zeros(1, dtype=torch.int64)
    rows = BlockRows(one, one, one, torch.tensor([label]), (0,), (1,))
    logits = torch.tensor([q]).log().requires_grad_()
    plan = BlockPlan(
        teacher=GivenTeacher(torch.tensor([p]), len(q)), rows=rows, options=options(**fields),
        steps=3, shard_ids=torch.arange(len(q)),
        in_draft_vocab=torch.arange(len(p)) < len(q), group=OneRank(),  # type: ignore[arg-type]
        gradient=True, chunk_bytes=1 << 20,
    )  # fmt: skip
    result = block_loss(logits, torch.eye(len(q)), None, plan, Budgets(0, 0))
    result.loss.backward()
    assert logits.grad is not None
    return result, logits.grad[0]


def test_the_l1_distance_is_not_halved() -> None:
    result, gradient = score([0.9, 0.06, 0.04], [0.5, 0.3, 0.2], 0, ce_weight=0.0, l1_weight=1.0)
    assert float(result.loss) == pytest.approx(0.8) and float(result.values.alpha) == pytest.approx(
        0.6
    )
    assert gradient.tolist() == pytest.approx([0.18, -0.108, -0.072], abs=1e-6)


def test_a_row_of_dspark() -> None:
    """0.1 CE + 0.9 L1; the confidence's loss at a logit of 0.3 makes it 1.4049."""
    result, _ = score([0.9, 0.06, 0.04], [0.5, 0.3, 0.2], 0)
    confidence = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([0.3]), result.values.alpha
    )
    assert float(confidence) == pytest.approx(0.6744, abs=1e-4)
    assert float(result.loss + confidence) == pytest.approx(1.4049, abs=1e-4)


def test_disjoint_distributions_have_distance_2_and_are_never_accepted() -> None:
    tiny = 1e-12
    result, _ = score([1.0, tiny, tiny], [tiny, 0.5, 0.5], 1, ce_weight=0.0, l1_weight=1.0)
    assert float(result.loss) == pytest.approx(2.0)
    assert float(result.values.alpha) == pytest.approx(0.0, abs=1e-6)


def test_a_smaller_vocabulary_is_compared_with_the_base_s_whole_distribution() -> None:
    result, _ = score([0.9, 0.06, 0.04], [0.4, 0.2, 0.1, 0.3], 3, l1_weight=1.0)
    assert float(result.values.coverage) == pytest.approx(0.7)
    assert float(result.values.alpha) == pytest.approx(0.5)
    assert float(result.loss) == pytest.approx(1.0), "no cross-entropy with a token it cannot say"


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        ([1, 1, 1, 1], [1.9615, 1.1583, 0.6089, 0.2970]),
        ([1, 1, 0, 1], [1.8759, 1.0726, 0.0, 0.5232]),
        ([1, 1, 0, 0], [1.3527, 0.5494, 0.0, 0.0]),
    ],
)
def test_d_pace(judged: list[int], expected: list[float]) -> None:
    right = (-torch.tensor([[0.5, 1.0, 2.0, 0.1]])).exp()
    weights = d_pace(right, torch.tensor([judged], dtype=torch.bool), 0.5)
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_normalizers() -> None:
    """Two blocks, the second with one judged slot: cross-entropies 1, 2, 3 and 4."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    judged = torch.tensor([[True, True, True], [True, False, False]])
    fixed = torch.tensor(options(position_decay=4.0).weights) * judged
    assert float((fixed * losses).sum()) == pytest.approx(8.3772, abs=1e-4)
    assert float((fixed * losses).sum() / fixed.sum()) == pytest.approx(2.4746, abs=1e-4)
    pace = d_pace((-losses).exp(), judged, 0.5)
    assert pace[0].tolist() == pytest.approx([1.2760, 0.5920, 0.2038], abs=1e-4)
    assert float((pace * losses).sum() / 2) == pytest.approx(2.5540, abs=1e-4)


def test_the_fixed_weights() -> None:
    weights = EagleConfig.of(algorithm="dflash", mask_token=0).blocks().weights
    assert weights == pytest.approx([1, 0.7788, 0.6065, 0.4724, 0.3679, 0.2865, 0.2231], abs=1e-4)
    assert sum(weights) == pytest.approx(3.7352, abs=1e-4)


def test_the_expected_length_is_formed_block_by_block() -> None:
    from megatron_eagle.loss.block_plan import BlockValues
    from megatron_eagle.objective.block_metrics import BlockSums, block_sums

    alpha = torch.tensor([0.9, 0.9, 0.1, 0.1])
    zero = torch.zeros(4)
    rows = BlockRows(
        torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.arange(4), torch.arange(4),
        (0, 2), (2, 2),
    )  # fmt: skip
    values = BlockValues(zero, zero, alpha, zero.bool(), zero, zero, zero)
    sums = BlockSums.unpack(block_sums(rows, values, torch.zeros(()), 2))
    assert float(sums.expected / sums.blocks) == pytest.approx(0.91)
