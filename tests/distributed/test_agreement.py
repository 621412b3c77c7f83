"""Ranks that read different files find out before they train, and agree on what the best is."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_eagle.testing.harness import run_distributed


def _disagree(rank: int, _: int, folder: str) -> list[str]:
    import torch

    from megatron_eagle.errors import UserError
    from megatron_eagle.training.agreement import check_agreement, digest_tensor
    from megatron_eagle.training.best_checkpoint import BestCheckpoint

    found = []
    same, other = torch.arange(5), torch.arange(5) + (rank == 1)
    check_agreement({"<base_checkpoint>": digest_tensor(same)})
    try:
        check_agreement({"<base_checkpoint>": digest_tensor(same), "ids": digest_tensor(other)})
    except UserError as error:
        found.append(str(error).split(" on ")[0])
    # The second rank sees no directory: it would save alone, and wait for ever.
    best = BestCheckpoint(Path(folder), *((2.0, 7) if rank == 0 else (0.0, 0)))
    saved = best.offer({"accepted_length": 1.5, "iteration": 9}, dict)
    return [*found, str(saved), str(best.iteration)]


def test_ranks_compare_what_they_read(tmp_path: Path) -> None:
    results = run_distributed(_disagree, 2, str(tmp_path))
    assert results == [["ids: rank 1", "False", "7"]] * 2
    assert os.listdir(tmp_path) == []
