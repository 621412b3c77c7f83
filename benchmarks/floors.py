"""How long a step must take at least: its operations at the rate of a good matrix product.

Counted is what the mathematics asks for, whoever computes it: K passes of the draft's layer over
the rows that are needed, its head at supervised positions, the teacher's product. Passes over
memory, launches and everything that is no product are not in it. The same arithmetic as the tables
of ``benchmarks/gpu_model.py``, whose count of products is compared with a real step's.
"""

from __future__ import annotations

from benchmarks.gpu_model import attention_flop, product_flop
from benchmarks.problem import Problem

TERA_FLOPS = {"H100": 700.0, "H200": 700.0, "A100": 250.0}
"""Dense bf16 products of a few thousand rows, in TFLOP/s, by a word in the device's name: about
0.7 of the peak (989, 989 and 312)."""
GOAL = 1.35
"""A step should take at most so many times its floor."""


def step_tera_flops(problem: Problem) -> float:
    """Return the operations of forward and backward of a micro-batch, in units of 10**12.

    The first ``mask_fraction`` of every sequence is a prompt: keys and values of the first pass
    read it, while queries, what follows them, later passes and the heads leave it out. The teacher
    multiplies once; a smaller draft vocabulary's columns are among its own.
    """
    products = product_flop(problem, narrow=True)
    return (sum(products.values()) + attention_flop(problem, narrow=True)) / 1e12


def floor_ms(problem: Problem, device_name: str) -> float | None:
    """Return the floor of a step in milliseconds; None for a device whose rate is not known."""
    rates = [rate for word, rate in TERA_FLOPS.items() if word in device_name]
    return step_tera_flops(problem) / rates[0] * 1e3 if rates else None
