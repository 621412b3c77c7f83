"""The fused loss of one rank equals plain autograd, in whatever chunks it runs."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eagle.config.train_options import LOSSES
from megatron_eagle.loss.head_gradient import HeadGradient, RowsAddedElsewhere
from megatron_eagle.loss.inputs import Budgets, LossRows
from megatron_eagle.loss.registry import ROW_LOSSES, row_loss
from megatron_eagle.loss.shard_softmax import row_max, shard_softmax_
from megatron_eagle.loss.soft_cross_entropy import soft_cross_entropy
from megatron_eagle.loss.statistics import LossSums, TeacherStats
from megatron_eagle.parallel.vocab import even_chunks
from megatron_eagle.platform.cpu import products

STEPS, TARGETS, SIZE, VOCAB = 3, 11, 16, 700


class OneRank:
    def size(self) -> int:
        return 1


class Teacher:
    full_columns = draft_columns = VOCAB

    def __init__(self, logits: Tensor, outside: int = 0) -> None:
        self.logits, self.outside = logits, outside

    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        softmax = self.logits[chunk].clone()
        top, sum_exp, position = shard_softmax_(softmax)
        # The tokens outside the draft's vocabulary repeat the first ones.
        full_sum_exp = sum_exp * (1 + softmax[:, : self.outside].sum(-1))
        return softmax, TeacherStats(top, sum_exp, top, position, full_sum_exp)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, LossRows]:
    torch.manual_seed(0)
    hidden = torch.randn(STEPS, TARGETS, SIZE).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, SIZE).to(dtype).requires_grad_()
    mask = torch.rand(STEPS, TARGETS) < 0.7
    rows = LossRows(mask, torch.tensor([1.0, 0.8, 0.64]), torch.arange(VOCAB), None)
    return hidden, weight, 2 * torch.randn(TARGETS, VOCAB), rows


def run(dtype: torch.dtype, chunk_rows: int) -> tuple[Tensor, LossSums, tuple[Tensor, ...]]:
    hidden, weight, logits, rows = problem(dtype)
    chunk_bytes = 4 * chunk_rows * (STEPS + 1) * VOCAB
    group, budgets = cast(Any, OneRank()), Budgets(0, 0, chunk_bytes)
    loss, sums, hits = soft_cross_entropy(hidden, weight, Teacher(logits), rows, group, budgets)
    assert hits.sum(-1).tolist() == sums.hits.tolist()
    return loss.detach(), sums, torch.autograd.grad(2.5 * loss, [hidden, weight])


def expected(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    hidden, weight, logits, rows = problem(dtype)
    draft = (hidden @ weight.t()).float()
    losses = -(logits.softmax(-1) * draft.log_softmax(-1)).sum(-1)
    loss = (losses * rows.mask * rows.step_weights.unsqueeze(-1)).sum()
    hits = (draft.argmax(-1) == logits.argmax(-1)) & rows.mask
    return loss.detach(), torch.autograd.grad(2.5 * loss, [hidden, weight]), hits.sum(-1)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_equals_autograd(chunk_rows: int) -> None:
    loss, sums, gradients = run(torch.float32, chunk_rows)
    wanted, wanted_gradients, hits = expected(torch.float32)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-5)
    assert sums.hits.tolist() == hits.tolist()


def test_bf16_keeps_fp32_statistics() -> None:
    loss, _, gradients = run(torch.bfloat16, chunk_rows=4)
    wanted, wanted_gradients, _ = expected(torch.bfloat16)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for found, other in zip(gradients, wanted_gradients, strict=True):
        difference = (found.float() - other.float()).norm() / other.float().norm()
        assert difference < 0.01


def test_the_options_and_the_registry_name_the_same_losses() -> None:
    assert tuple(ROW_LOSSES) == LOSSES


@pytest.mark.parametrize("name", [name for name in ROW_LOSSES if name != "lk-lambda"])
def test_gradients_equal_finite_differences(name: str) -> None:
    """Along a random direction of hidden and weight; a quarter of the base's vocabulary is outside
    the draft's, so that what it likes there lowers the acceptance. (lk-lambda does not
    differentiate its weight; the reference does the same.)"""
    hidden, weight, logits, rows = problem(torch.float32)

    def value(at: float, directions: tuple[Tensor, ...]) -> Tensor:
        moved = [x + at * d for x, d in zip((hidden, weight), directions, strict=True)]
        return soft_cross_entropy(
            moved[0], moved[1], Teacher(logits, outside=VOCAB // 4), rows,
            cast(Any, OneRank()), Budgets(0, 0), row_loss(name, 3.0),
        )[0]  # fmt: skip

    directions = (torch.randn_like(hidden), torch.randn_like(weight) / 4)
    gradients = torch.autograd.grad(value(0.0, directions), [hidden, weight])
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    with torch.no_grad():
        measured = float(value(2e-3, directions) - value(-2e-3, directions)) / 4e-3
    assert slope == pytest.approx(measured, rel=2e-2, abs=2e-2)
    assert abs(slope) > 0.05, "the direction must say something"


def test_a_second_backward_is_refused() -> None:
    hidden, weight, logits, rows = problem(torch.float32)
    loss, *_ = soft_cross_entropy(
        hidden, weight, Teacher(logits), rows, cast(Any, OneRank()), Budgets(0, 0)
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, logits, rows = problem(torch.float32)
    group, budgets = cast(Any, OneRank()), Budgets(0, 0)
    with torch.no_grad():
        loss, *_ = soft_cross_entropy(hidden, weight, Teacher(logits), rows, group, budgets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected(torch.float32)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 127, 256, 300, 640, 1001])
def test_row_max_is_the_first_of_equals(columns: int) -> None:
    torch.manual_seed(columns)
    logits = torch.randint(-4, 4, (50, columns)).float()  # full of ties
    top, index = row_max(logits)
    assert top.equal(logits.amax(-1))
    first = (logits == top.unsqueeze(-1)).int().argmax(-1)
    assert index.equal(first)


@pytest.mark.parametrize(("rows", "largest"), [(0, 4), (1, 4), (9, 4), (8, 4), (3, 0)])
def test_chunks_cover_all_rows_evenly(rows: int, largest: int) -> None:
    chunks = even_chunks(rows, largest)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert max(sizes) <= max(1, largest) and max(sizes) - min(sizes) <= 1


class LargeAllocations(TorchDispatchMode):
    """Counts new tensors of at least ``elements``."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.found = elements, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.nbytes() >= self.elements * 2:
                self.found += 1
        return result


class Head:
    """A parameter with a ``main_grad``, and Megatron's hook."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.nn.Parameter(weight.detach().clone())
        self.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        node = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]  # type: ignore
        self.node, self.calls = node, 0
        node.register_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        assert self.weight.grad is not None
        if not getattr(self.weight, "grad_added_to_main_grad", False):
            self.main_grad.add_(self.weight.grad)
        self.weight.grad = None
        self.calls += 1


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_heads_gradient_goes_into_a_buffer_without_another_of_its_size(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches, padded head, small chunks: no temporary."""
    # oneDNN makes a product before it is added, in pieces that are this small head.
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    padded = VOCAB + 4
    hidden, weight, logits, rows = problem(torch.float32)
    head = Head(torch.cat([weight.detach(), weight.new_zeros(4, SIZE)]))
    group, budgets = cast(Any, OneRank()), Budgets(0, 0, 4 * 2 * (STEPS + 1) * VOCAB)
    target = HeadGradient(head.main_grad[:VOCAB], torch.tensor(scale))
    with LargeAllocations(VOCAB * SIZE) as allocations:
        for _ in range(2):
            own = RowsAddedElsewhere.apply(head.weight, VOCAB)
            loss, *_ = soft_cross_entropy(
                hidden, own, Teacher(logits), rows, group, budgets, head_gradient=target
            )
            (scale * loss).backward()
    assert allocations.found == 0 and head.calls == 2
    hidden.grad = None
    expected_loss, *_ = soft_cross_entropy(hidden, weight, Teacher(logits), rows, group, budgets)
    (2 * scale * expected_loss).backward()
    assert head.main_grad.shape == (padded, SIZE) and not head.main_grad[VOCAB:].any()
    torch.testing.assert_close(head.main_grad[:VOCAB], weight.grad, rtol=1e-5, atol=1e-5)


def loss_made_for_scale_one() -> tuple[Tensor, Tensor]:
    """A loss whose head gradient was added elsewhere in forward, and the hidden states it reads."""
    hidden, weight, logits, rows = problem(torch.float32)
    target = HeadGradient(torch.zeros_like(weight), torch.tensor(1.0))
    loss, *_ = soft_cross_entropy(
        hidden, weight, Teacher(logits), rows, cast(Any, OneRank()), Budgets(0, 0),
        head_gradient=target,
    )  # fmt: skip
    return loss, hidden


def test_a_scale_that_was_not_expected_is_an_error() -> None:
    loss, _ = loss_made_for_scale_one()
    with pytest.raises(RuntimeError, match="scale it was made for"):
        (2 * loss).backward()


def test_a_loss_of_nan_is_left_to_the_search_for_nan() -> None:
    loss, hidden = loss_made_for_scale_one()
    (float("nan") * loss).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()
