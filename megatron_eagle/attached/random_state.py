"""Draw a draft's first weights without touching the random generators of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_eagle.compat import get_cuda_rng_tracker


@contextmanager
def seeded(seed: int, groups: Any) -> Iterator[None]:
    """Seed torch's and Megatron's generators as a run of ``seed`` begins, and put them back after.

    ``groups``: the ranks of ``tp`` and ``ep`` draw different numbers where Megatron wants it, all
    others the same. No collective.
    """
    tracker = get_cuda_rng_tracker()
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    tracked, initialized = tracker.get_states(), tracker.is_initialized()
    try:
        torch.manual_seed(seed)
        expert_tp = getattr(groups, "expt_tp", None)
        model_parallel_cuda_manual_seed(
            seed,
            tp_rank=groups.tp.rank(),
            ep_rank=groups.ep.rank() if getattr(groups, "ep", None) is not None else 0,
            etp_rank=0 if expert_tp is None else expert_tp.rank(),
        )
        yield
    finally:
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
        tracker.reset()
        if initialized:
            tracker.set_states(tracked)
