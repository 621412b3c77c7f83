"""The drafting algorithms, one file each; docs/dev/adding-an-algorithm.md says how."""

from __future__ import annotations

from megatron_eagle.algorithms.base import Algorithm, DraftBlocks, Schedule
from megatron_eagle.algorithms.dflash import DFlash
from megatron_eagle.algorithms.dspark import DSpark
from megatron_eagle.algorithms.eagle1 import Eagle1
from megatron_eagle.algorithms.eagle3 import Eagle3
from megatron_eagle.algorithms.eagle31 import Eagle31
from megatron_eagle.algorithms.mtp import MTP
from megatron_eagle.algorithms.p_eagle import PEagle

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (Eagle1(), Eagle3(), Eagle31(), PEagle(), DFlash(), DSpark(), MTP())
}
"""Every algorithm by its name."""

SPECIAL_OPTIONS: frozenset[str] = frozenset().union(*(a.options for a in ALGORITHMS.values()))
"""Options that only some algorithms have."""

__all__ = [
    "ALGORITHMS",
    "MTP",
    "SPECIAL_OPTIONS",
    "Algorithm",
    "DFlash",
    "DSpark",
    "DraftBlocks",
    "Eagle1",
    "Eagle3",
    "Eagle31",
    "PEagle",
    "Schedule",
]
