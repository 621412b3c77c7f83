"""The losses by the name that the option ``loss`` takes."""

from __future__ import annotations

from collections.abc import Callable

from megatron_eagle.loss.acceptance import LogAcceptance, MixedAcceptance, TotalVariation
from megatron_eagle.loss.cross_entropy import HardCrossEntropy, SoftCrossEntropy
from megatron_eagle.loss.reverse_kl import ReverseKL
from megatron_eagle.loss.row_loss import RowLoss

ROW_LOSSES: dict[str, Callable[[float], RowLoss]] = {
    "kl": lambda _: SoftCrossEntropy(),
    "ce": lambda _: HardCrossEntropy(),
    "reverse-kl": lambda _: ReverseKL(),
    "tv": lambda _: TotalVariation(),
    "lk-alpha": lambda _: LogAcceptance(),
    "lk-lambda": MixedAcceptance,
}
"""Name to a function that makes the loss from the option ``lk_decay``.

``LOSSES`` in ``config/train_options.py``, which must do without torch, repeats the names; a unit
test compares the two.
"""


def row_loss(name: str, lk_decay: float) -> RowLoss:
    """Make the loss called ``name``; ``lk_decay`` is the decay of ``lk-lambda``."""
    return ROW_LOSSES[name](lk_decay)
