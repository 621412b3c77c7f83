"""How the tensors of a module of ours lie in a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)


def sharded_tensors(
    tensors: Mapping[str, Tensor],
    axes: dict[str, int],
    tp_group: ProcessGroup,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict[str, Any]:
    """The ``sharded_state_dict`` of ``tensors``: those in ``axes`` are cut over ``tp_group`` along
    that dimension, the others are whole on every rank. No collective."""
    return make_sharded_tensors_for_checkpoint(
        tensors,
        prefix,
        axes,
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
