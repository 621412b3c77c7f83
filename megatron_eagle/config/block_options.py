"""The options of a block draft's training, with the defaults of its algorithm filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_eagle.config.spec import DraftSpec
from megatron_eagle.config.train_options import ANCHORS, POSITION_DECAY, TrainOptions
from megatron_eagle.errors import UserError

D_PACE_FLOOR = 0.5
"""Share of D-PACE's factor that no slot can lose, alpha in arXiv 2605.18810."""


@dataclass(frozen=True)
class BlockOptions:
    """How a block draft is trained.

    ``anchors``: blocks per sequence. ``weights``: of the K judged slots; None for D-PACE. ``ce``,
    ``kl``, ``l1``, ``confidence``: weights of the losses. ``data_alone``: metrics too compare with
    the data's tokens, so that nothing reads the base's distribution.
    """

    anchors: int
    weights: tuple[float, ...] | None
    ce: float
    kl: float
    l1: float
    confidence: float
    data_alone: bool

    @classmethod
    def of(cls, spec: DraftSpec, train: TrainOptions) -> BlockOptions:
        """Fill in the defaults; raise :class:`UserError` if no loss is left."""
        steps, dspark = spec.block_drafts, spec.markov is not None
        decay = POSITION_DECAY if train.position_decay is None else train.position_decay
        fixed = tuple(math.exp(-t / decay) for t in range(steps))
        if train.confidence_weight is not None and not spec.confidence_head:
            raise UserError(
                f"<confidence_weight> {train.confidence_weight}: the draft has no <confidence_head>"
            )
        options = cls(
            anchors=train.anchors or ANCHORS,
            weights=None if train.position_weights == "d-pace" else fixed,
            ce=_or(train.ce_weight, 0.1 if dspark else 1.0),
            kl=_or(train.kl_weight, 0.0),
            l1=_or(train.l1_weight, 0.9 if dspark else 0.0),
            confidence=_or(train.confidence_weight, 1.0) if spec.confidence_head else 0.0,
            data_alone=train.accuracy_target == "data",
        )
        if options.ce + options.kl + options.l1 <= 0:
            raise UserError("<ce_weight>, <kl_weight> and <l1_weight> are all 0: no loss is left")
        if options.data_alone and (options.kl or options.needs_overlap):
            raise UserError(
                "<accuracy_target> data spares what <kl_weight>, <l1_weight> and a confidence head "
                "read anyway: leave it out, or set these to 0"
            )
        return options

    @property
    def needs_overlap(self) -> bool:
        """Whether the loss needs the acceptance rate, which costs a second reduction."""
        return self.l1 > 0 or self.confidence > 0


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
