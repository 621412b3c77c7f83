"""MoE layers of a draft: Megatron's own, whose balance loss joins the draft's loss.

Megatron adds the balance loss to the gradient through an autograd hook, outside the main loss,
scaled for a loss over all tokens and one pass. A draft is judged on supervised tokens only and runs
K times, so its routers keep their losses instead, and the model adds them to its own.

A balance loss belongs to a micro-batch's whole sequences. Where sequence and context parallelism
spread the tokens over ranks, each rank's loss is the part of its tokens, and the parts add up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import TopKRouter


class DraftRouter(TopKRouter):
    """TopKRouter that keeps its balance losses until :func:`take_balance_loss` collects them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance_losses: list[Tensor] = []
        # Beside a base whose routers have biases Megatron would update ours, which has none, and
        # reset its counts.
        self.frozen_expert_bias = True
        self.local_tokens_per_expert = torch.empty(0)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Keep ``aux_loss``, coefficient included, when Megatron adds it in training."""
        self.balance_losses.append(aux_loss)
        return activation


def keep_balance_losses(layer_spec: Any) -> None:
    """Change a MoE TransformerLayer spec in place to use :class:`DraftRouter`."""
    submodules = layer_spec.submodules
    moe = submodules.mlp.keywords["submodules"]
    submodules.mlp = partial(submodules.mlp.func, submodules=replace(moe, router=DraftRouter))


def take_balance_loss(draft: torch.nn.Module, rows: Tensor, group: ProcessGroup) -> Tensor | None:
    """Return this rank's part of the balance loss of the passes since the last call, for a loss
    that is a sum over tokens; None if no layer has experts.

    It is the mean over passes, summed over layers, times the micro-batch's supervised tokens:
    ``rows`` [] on this rank, summed over the context-parallel ``group`` (one all-reduce of a number
    if the group has more than one rank).
    """
    total: Tensor | None = None
    for module in draft.modules():
        if isinstance(module, DraftRouter) and module.balance_losses:
            mean = torch.stack(module.balance_losses).mean()
            module.balance_losses = []
            total = mean if total is None else total + mean
    if total is None:
        return None
    rows = rows.detach().clone()
    if group.size() > 1:
        torch.distributed.all_reduce(rows, group=group)
    return total * rows
