"""Are the flash kernels right on this device? Each against a softmax in fp64 on the CPU.

q is [B, n, S, d], k [B, g, L, d], v [B, g, L, dv]; S queries, L keys, n query and g key heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu_report import Report
from benchmarks.problem import DTYPES

BATCH, HEADS, GROUPS, SCALE = 2, 4, 2, 0.2
BOUNDS = {"bf16": 0.02, "fp32": 1e-4}
"""How far a result may be off, as a part of its norm."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One use of the kernels: ``window`` and ``documents`` (lengths) in one launch, of a base
    forward only; ``size`` and ``width`` are the channels of keys and values."""

    queries: int = 160
    keys: int = 160
    size: int = 64
    width: int = 64
    causal: bool = True
    documents: tuple[int, ...] = ()
    window: int | None = None
    of_draft: bool = False

    def spans(self) -> list[list[tuple[int, int]]]:
        """Return the (start, stop) of the documents, alike in every sequence."""
        stops = torch.tensor(self.documents).cumsum(0).tolist()
        return [list(zip([0, *stops[:-1]], stops, strict=True))] * BATCH

    def visible(self) -> Tensor:
        """Return which keys each query sees, [S, L]."""
        rows, columns = torch.arange(self.queries)[:, None], torch.arange(self.keys)
        seen = columns <= rows if self.causal else torch.ones(self.queries, self.keys).bool()
        if self.window is not None:
            seen = seen & (rows - columns < self.window)
        if self.documents:
            document = torch.arange(len(self.documents)).repeat_interleave(
                torch.tensor(self.documents)
            )
            seen = seen & (document[:, None] == document)
        return seen


KINDS = {
    "causal": Kind(),
    "every key": Kind(queries=96, causal=False),
    "heads of 100": Kind(size=100, width=100),
    "values narrower than keys": Kind(size=96, width=64),
    "a base's documents": Kind(documents=(60, 1, 99)),
    "a base's window": Kind(window=24),
    "a draft's documents": Kind(documents=(60, 1, 99), of_draft=True),
}


def check_attention(report: Report, device: str) -> bool:
    """Compare output, log-sum-exp and gradients of every kind in both precisions with the
    reference. Returns whether all are right. One launch for documents and windows is CUDA's."""
    right = True
    for dtype, bound in BOUNDS.items():
        for name, kind in KINDS.items():
            in_one_launch = bool(kind.documents or kind.window)
            if in_one_launch and (device == "cpu" or dtype == "fp32"):
                continue
            off = _largest_error(kind, device, DTYPES[dtype])
            report.say(f"attention: {name}, {dtype}", right=off < bound, off_by=off)
            right = right and off < bound
    return right


def _largest_error(kind: Kind, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(2)
    shapes = [(HEADS, kind.queries, kind.size), (GROUPS, kind.keys, kind.size)]
    shapes += [(GROUPS, kind.keys, kind.width), (HEADS, kind.queries, kind.width)]
    q, k, v, grad = (torch.randn(BATCH, *s, generator=generator).to(dtype) for s in shapes)
    found = _run(kind, *(x.to(device) for x in (q, k, v, grad)))
    expected = _reference(kind, *(x.double() for x in (q, k, v, grad)))
    pairs = zip(found, expected[: len(found)], strict=True)
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)


def _run(kind: Kind, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Sequence[Tensor]:
    """Return output and log-sum-exp, and the gradients of q, k, v where there is a backward."""
    from megatron_eagle.attention import flash, one_launch, varlen

    if kind.of_draft:
        runs = [[(0, kind.queries)]] * BATCH
        segments = varlen.Segments.of(runs, kind.spans(), q.device)
        out, lse = varlen.forward(q, k, v, SCALE, segments)
        return out, lse, *varlen.backward(grad, q, k, v, out, lse, SCALE, segments)
    if kind.documents or kind.window:
        bounds = None
        if kind.documents:
            bounds = one_launch.Bounds.of(kind.spans(), kind.queries, q.device)
        return one_launch.forward(q, k, v, SCALE, bounds, kind.window)
    out, lse = flash.forward(q, k, v, SCALE, kind.causal)
    return out, lse, *flash.backward(grad, q, k, v, out, lse, SCALE, kind.causal)


def _reference(kind: Kind, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Sequence[Tensor]:
    for x in (q, k, v):
        x.requires_grad_()
    keys, values = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = (q @ keys.mT * SCALE).masked_fill(~kind.visible(), float("-inf"))
    out = scores.softmax(-1) @ values
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    return out.detach(), scores.detach().logsumexp(-1), *gradients
