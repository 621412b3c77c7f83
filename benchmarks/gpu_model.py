"""How long a training step should take on one H100, by arithmetic: prints a table.

    python benchmarks/gpu_model.py

Nothing here is measured. A part takes its FLOP over 700 TFLOP/s or its bytes over 3 TB/s, bf16;
launches, small operators and idle time are left out. *Before* are layers that run every row and
eager passes over logits, *after* live rows and Triton kernels. ``benchmarks/gpu.py`` measures the
same step, and one run of it on a GPU replaces this page.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problem import Problem

FLOP_PER_SECOND, BYTES_PER_SECOND = 700e12, 3e12
LLAMA_1B = Problem(
    hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocab=128256, draft_vocab=128256,
    seq=2048, batch=16, ttt=3, dtype="bf16",
)  # fmt: skip
LLAMA_8B = dataclasses.replace(
    LLAMA_1B, hidden=4096, intermediate=14336, seq=4096, batch=2, draft_vocab=32000
)
EAGER_LOGIT_BYTES, KERNEL_LOGIT_BYTES = 46, 14
"""Bytes read and written per draft logit in bf16: eager max (2), copy to fp32 (6), product with the
teacher and its sum (16), softmax (8, and 4 to read a long row again), subtraction (10); the kernel
reads logits and teacher twice (12) and writes the gradient (2)."""
EAGER_TEACHER_BYTES, KERNEL_TEACHER_BYTES = 16, 12
"""Per teacher logit in fp32: maximum and softmax; two reads and a write."""


def rows_of(problem: Problem) -> tuple[int, int, int]:
    """Return how many rows there are, are live, and are judged per step."""
    prompt = round(problem.mask_fraction * problem.seq)
    judged = problem.seq - 1 - prompt
    live = min(problem.seq - 1, judged + problem.ttt - 1)
    if problem.seq - live <= problem.seq // 32:  # all rows go on, see attention/live_rows.py
        live = problem.seq
    return tuple(problem.batch * n for n in (problem.seq, live, judged))  # type: ignore[return-value]


def product_flop(problem: Problem, narrow: bool) -> dict[str, float]:
    """Return FLOP of the matrix products, forward and backward, by part.

    A product's gradients are two more products, but the features and the frozen head need none.
    """
    rows, live, judged = rows_of(problem)
    hidden, kv = problem.hidden, problem.kv_heads * problem.head_dim
    keys_values = 2 * hidden * 2 * kv
    others = 2 * hidden * hidden + hidden * hidden + 3 * hidden * problem.intermediate
    later = live if narrow else rows
    layer_rows = rows * keys_values + later * others
    layer_rows += (problem.ttt - 1) * later * (keys_values + others)
    return {
        "fc": 2 * 2 * rows * problem.aux * hidden**2,
        "layer products": 3 * 2 * layer_rows,
        "head": 3 * 2 * problem.ttt * judged * hidden * problem.draft_vocab,
        # Before, the draft's columns were multiplied again instead of being picked out.
        "teacher": 2 * judged * hidden * (problem.vocab if narrow else _teacher_columns(problem)),
    }


def attention_flop(problem: Problem, narrow: bool) -> float:
    """Return FLOP of the queries against the trunk: two products forward, five backward.

    A row reads the rows of its document up to itself; live rows are the last of their sequence.
    """
    rows, live, _ = rows_of(problem)
    queries = (live if narrow else rows) // problem.batch
    positions = problem.positions()
    within = torch.arange(problem.seq) if positions is None else positions[0]
    pairs = int((within[problem.seq - queries :] + 1).sum())
    return 7 * 2 * problem.ttt * problem.batch * pairs * problem.hidden


def pass_bytes(problem: Problem, narrow: bool, kernels: bool) -> dict[str, float]:
    """Return bytes of the passes that multiply nothing, by part."""
    rows, live, judged = rows_of(problem)
    row_steps = rows + (problem.ttt - 1) * (live if narrow else rows)
    logit = KERNEL_LOGIT_BYTES if kernels else EAGER_LOGIT_BYTES
    teacher = KERNEL_TEACHER_BYTES if kernels else EAGER_TEACHER_BYTES
    columns = _teacher_columns(problem)
    picked = 8 * (columns - problem.vocab) if narrow else 0
    return {
        "passes over logits": judged * problem.draft_vocab * problem.ttt * logit
        + judged * (columns * teacher + picked),
        # Norms, rotary embedding, residual sums: 40 H values; the gated MLP's: 8 F.
        "norms and the like": row_steps * 2 * (40 * problem.hidden + 8 * problem.intermediate),
    }


def _teacher_columns(problem: Problem) -> int:
    """Return the columns of the teacher's softmaxes: the draft's own again, if they are fewer."""
    compressed = problem.draft_vocab < problem.vocab
    return problem.vocab + (problem.draft_vocab if compressed else 0)


def milliseconds(problem: Problem, narrow: bool, kernels: bool) -> dict[str, float]:
    """Return the time of every part, and of all."""
    flop = product_flop(problem, narrow) | {"attention": attention_flop(problem, narrow)}
    times = {part: 1e3 * n / FLOP_PER_SECOND for part, n in flop.items()}
    moved = pass_bytes(problem, narrow, kernels)
    times |= {part: 1e3 * n / BYTES_PER_SECOND for part, n in moved.items()}
    return times | {"**all**": sum(times.values())}


def table(problem: Problem) -> list[str]:
    """Return the lines of a table in Markdown."""
    fractions = (0.0, 0.6)
    columns = [
        milliseconds(dataclasses.replace(problem, mask_fraction=fraction), after, after)
        for fraction in fractions
        for after in (False, True)
    ]
    heads = [f"{f:.0%} masked, {when}" for f in fractions for when in ("before", "after")]
    lines = ["| ms | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for part in columns[0]:
        cells = " | ".join(f"{column[part]:.1f}" for column in columns)
        lines.append(f"| {part} | {cells} |")
    return lines


def main() -> None:
    smaller = dataclasses.replace(LLAMA_1B, draft_vocab=32000)
    for name, problem in (
        ("Llama-3.2-1B, whole vocabulary", LLAMA_1B),
        ("Llama-3.2-1B, draft vocabulary 32000", smaller),
        ("Llama-3.1-8B, draft vocabulary 32000", LLAMA_8B),
    ):
        print(f"\n{name}: {problem.batch} sequences of {problem.seq}, K {problem.ttt}\n")
        print("\n".join(table(problem)))


if __name__ == "__main__":
    main()
