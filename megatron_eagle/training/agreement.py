"""Check that all ranks read the same base, vocabulary and data, before the first step.

Every rank reads its files itself. A copy on one node that is older than on the others would give
that node's ranks another head or other samples, and no number would show it.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.errors import UserError


def check_agreement(digests: Mapping[str, str]) -> None:
    """Compare ``digests``, by what they are of, with those of all other ranks.

    A collective of all ranks. Raises ``UserError`` on every rank, naming the first rank and host
    that differ from the first one.
    """
    own = (socket.gethostname(), dict(digests))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    first_host, first = every[0]
    for rank, (host, other) in enumerate(every):
        for name, digest in first.items():
            if other.get(name) != digest:
                raise UserError(
                    f"{name}: rank {rank} on {host} reads something else than rank 0 on "
                    f"{first_host}; put it on storage that all nodes share"
                )


def digest_tensor(tensor: Tensor) -> str:
    """Return a hash of a tensor's numbers."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()


def digest_data_sets(prefixes: Sequence[str]) -> str:
    """Return a hash of the index files of Megatron data sets, and of how large their data are."""
    found = hashlib.sha256()
    for prefix in prefixes:
        found.update(Path(f"{prefix}.idx").read_bytes())
        found.update(str(Path(f"{prefix}.bin").stat().st_size).encode())
    return found.hexdigest()
