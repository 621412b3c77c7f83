"""How long a step must take at least: its operations at the rate of a good matrix product.

Counted is what the mathematics asks for, whoever computes it: K passes of the draft's layer, its
head at supervised positions, the teacher's products. Passes over memory, launches and everything
that is no product are not in it. Shape letters: S sequence, B micro-batch, K TTT steps, H hidden.
"""

from __future__ import annotations

from benchmarks.problem import Problem

TERA_FLOPS = {"H100": 700.0, "H200": 700.0, "A100": 250.0}
"""Dense bf16 products of a few thousand rows, in TFLOP/s, by a word in the device's name: about
0.7 of the peak (989, 989 and 312)."""
GOAL = 1.35
"""A step should take at most so many times its floor."""


def step_tera_flops(problem: Problem) -> float:
    """Return the operations of forward and backward of a micro-batch, in units of 10**12.

    The first ``mask_fraction`` of every sequence is a prompt: keys of the first pass read it, while
    later passes and the heads leave it out.
    """
    hidden, steps = problem.hidden, problem.ttt
    tokens = problem.batch * problem.seq
    judged = tokens * (1 - problem.mask_fraction)
    heads, groups = problem.heads * problem.head_dim, problem.kv_heads * problem.head_dim
    projections = 2 * hidden * (heads + 2 * groups) + heads * hidden
    layer = projections + 3 * hidden * problem.intermediate
    rows = tokens + (steps - 1) * judged
    pairs = problem.batch * problem.seq**2 / 2 / problem.documents
    later_pairs = pairs * (1 - problem.mask_fraction**2)
    attention = 14 * heads * (pairs + (steps - 1) * later_pairs)  # 2 products, and 5 backward
    fc = 4 * problem.aux * hidden**2 * tokens  # its input needs no gradient
    teacher_rows = problem.vocab + (
        problem.draft_vocab if problem.draft_vocab < problem.vocab else 0
    )
    teacher = 2 * teacher_rows * hidden * judged
    head = 6 * problem.draft_vocab * hidden * judged * steps
    return (6 * layer * rows + attention + fc + teacher + head) / 1e12


def floor_ms(problem: Problem, device_name: str) -> float | None:
    """Return the floor of a step in milliseconds; None for a device whose rate is not known."""
    rates = [rate for word, rate in TERA_FLOPS.items() if word in device_name]
    return step_tera_flops(problem) / rates[0] * 1e3 if rates else None
