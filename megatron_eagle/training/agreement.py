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

from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.errors import UserError

_DOCUMENTS = 1000
"""So many documents are hashed, evenly spaced, beside the lengths of all."""


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


def digest_documents(documents: FittedDocuments) -> str:
    """Return a hash of the lengths of all documents, and of the tokens and masks of some."""
    found = hashlib.sha256(documents.lengths.astype("<i8").tobytes())
    for index in range(0, len(documents), -(-len(documents) // _DOCUMENTS)):
        for values in documents[index]:
            found.update(values.astype("<i8").tobytes())
    return found.hexdigest()


def digest_data_sets(prefixes: Sequence[str]) -> str:
    """Return a hash of the index files of Megatron data sets, and of how large their data are."""
    found = hashlib.sha256()
    for prefix in prefixes:
        found.update(Path(f"{prefix}.idx").read_bytes())
        found.update(str(Path(f"{prefix}.bin").stat().st_size).encode())
    return found.hexdigest()
