"""Routers of a draft that are not trained, as those of a next-token module.

Their weights and the biases by which they choose stay as they are, no balance loss is made, and
gradients flow through the experts' weights to the hidden state.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron_eagle.compat import TopKRouter
from megatron_eagle.layers.group_router import GroupLimitedRouter


class FrozenRouter(TopKRouter):
    """TopKRouter without a trained weight, always in eval mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)
        self.frozen_expert_bias = True
        super().train(False)

    def train(self, mode: bool = True) -> FrozenRouter:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)


class FrozenGroupRouter(FrozenRouter, GroupLimitedRouter):
    """The same, choosing among groups of experts as the base's family does."""


def freeze_router(layer_spec: Any, config: Any) -> None:
    """Change a MoE TransformerLayer spec in place to use a frozen router of ``config``'s kind."""
    submodules = layer_spec.submodules
    kind = FrozenRouter if config.moe_router_num_groups is None else FrozenGroupRouter
    moe = replace(submodules.mlp.keywords["submodules"], router=kind)
    submodules.mlp = partial(submodules.mlp.func, submodules=moe)
