"""Description of a module's tensors for Megatron's distributed checkpoints."""

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
    """Return the ``sharded_state_dict`` of ``tensors``; no collective.

    Tensors in ``axes`` are cut over ``tp_group`` along that dimension, the others are whole on
    every rank.
    """
    return make_sharded_tensors_for_checkpoint(
        tensors,
        prefix,
        axes,
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
