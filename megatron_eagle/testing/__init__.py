"""Test code on several ranks of one machine, without a GPU and without a launcher.

    from megatron_eagle.testing import megatron_parallel, run_distributed

``run_distributed`` calls a function on every rank of a fresh gloo process group and returns the
results; a rank that raises, dies or hangs becomes an error with its traceback. Inside a rank,
``megatron_parallel`` makes Megatron's process groups for any tensor, pipeline, context and expert
parallel sizes. ``harness`` has a complete example. ``start_rank`` and ``stop_rank`` are what it is
made of, for tests that launch whole programs.
"""

from __future__ import annotations

from megatron_eagle.testing.harness import (
    PRELOADED,
    RANK_ENVIRONMENT,
    RankError,
    megatron_parallel,
    run_distributed,
    start_rank,
    stop_rank,
)

__all__ = [
    "PRELOADED",
    "RANK_ENVIRONMENT",
    "RankError",
    "megatron_parallel",
    "run_distributed",
    "start_rank",
    "stop_rank",
]
