"""EagleConfig: the draft and its training, as the ``--eagle-*`` flags of one run say."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.config.block_options import BlockOptions
from megatron_eagle.config.option import given, names, shown
from megatron_eagle.config.spec import DraftSpec, check_algorithm_has
from megatron_eagle.config.train_options import MOE_BALANCE, REGRESSION_WEIGHT, TrainOptions
from megatron_eagle.errors import UserError

OPTIONS = (*names(DraftSpec), *names(TrainOptions))
"""Every option, in the order of ``--help``."""


@dataclass(frozen=True)
class EagleConfig:
    """The architecture of a draft beside the options of its training.

    Raises :class:`UserError` on construction for two options that contradict each other.
    """

    spec: DraftSpec = field(default_factory=DraftSpec)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        check_algorithm_has(self.spec.method, given(self.train))
        if self.spec.method.drafts_blocks:
            self.blocks()
        if self.train.init_from_base and self.spec.num_experts is not None:
            raise UserError(
                f"<init_from_base>: {shown('num_experts', self.spec.num_experts)} starts otherwise"
            )
        balance = self.train.moe_aux_loss_coeff
        if balance is not None and self.spec.num_experts is None:
            raise UserError(
                f"<moe_aux_loss_coeff> {balance}: only a MoE draft has it (<num_experts>)"
            )

    @classmethod
    def of(cls, **options: Any) -> EagleConfig:
        """Build from options by name, whichever of the two parts they belong to."""
        spec = {name: options.pop(name) for name in names(DraftSpec) if name in options}
        return cls(DraftSpec(**spec), TrainOptions(**options))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> EagleConfig:
        """Build from parsed flags, as :func:`~megatron_eagle.config.flags.add_eagle_flags` declared
        them."""
        return cls.of(**{name: getattr(args, f"eagle_{name}") for name in OPTIONS})

    def values(self) -> Mapping[str, Any]:
        """Return every option by name."""
        return {**vars(self.spec), **vars(self.train)}

    @property
    def regression_weight(self) -> float:
        """The weight of the smooth-L1 loss on the hidden state: 0 for all but EAGLE-1."""
        if not self.spec.method.regresses_hidden:
            return 0.0
        weight = self.train.regression_weight
        return REGRESSION_WEIGHT if weight is None else weight

    @property
    def moe_aux_loss_coeff(self) -> float:
        """The weight of a MoE draft's balance loss."""
        weight = self.train.moe_aux_loss_coeff
        return MOE_BALANCE if weight is None else weight

    @property
    def steps(self) -> int:
        """K: TTT steps, or the judged slots of a block."""
        spec = self.spec
        return spec.block_drafts if spec.method.drafts_blocks else self.train.ttt_steps

    def blocks(self) -> BlockOptions:
        """Return the options of a block draft's training, with their defaults filled in."""
        return BlockOptions.of(self.spec, self.train)

    def check_against_base(self, base_layers: int, vocab_size: int, seq_length: int) -> None:
        """Raise :class:`UserError` for options that a base of these dimensions cannot honour."""
        spec, steps = self.spec, self.steps
        for layer in spec.aux_layers_of(base_layers):
            if layer >= base_layers:
                raise UserError(
                    f"<aux_layers> {layer} is out of range: "
                    f"the base has layers 0 to {base_layers - 1}"
                )
        if spec.draft_vocab_size is not None and spec.draft_vocab_size > vocab_size:
            raise UserError(
                f"<draft_vocab_size> {spec.draft_vocab_size} exceeds "
                f"the base's vocabulary of {vocab_size}"
            )
        if spec.mask_token is not None and spec.mask_token >= vocab_size:
            raise UserError(
                f"<mask_token> {spec.mask_token} is outside the base's 0 to {vocab_size - 1}"
            )
        if seq_length < steps + 2:
            if spec.method.drafts_blocks:
                raise UserError(
                    f"<seq_length> {seq_length} is too short: <block_size> {spec.slots} needs at "
                    f"least {steps + 2} tokens"
                )
            raise UserError(
                f"<seq_length> {seq_length} is too short: <ttt_steps> {steps} needs at least "
                f"{steps + 2} tokens"
            )
