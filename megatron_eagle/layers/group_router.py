"""Route tokens to experts of a few groups, as DeepSeek's models do.

Megatron 0.19 scores a group by its best topk // group_topk experts. DeepSeek-V2 takes the best one,
DeepSeek-V3 the best two, however many experts are chosen.

Shape letters: S positions, B sequences, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import TopKRouter


class GroupLimitedRouter(TopKRouter):
    """Frozen group-limited router: no losses, no dropped token, TopKRouter's parameters."""

    def routing(self, logits: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        """Choose experts by logits [S, B, E]. No collective.

        Returns:
            Weights [S * B, E], zero for experts that are not chosen, and the choice, bool
            [S * B, E].
        """
        assert padding_mask is None and not self.training
        config = self.config
        logits = logits.view(-1, config.num_moe_experts)
        sigmoid = self.score_function == "sigmoid"
        scores = torch.sigmoid(logits.float()) if sigmoid else torch.softmax(logits.float(), dim=-1)
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        grouped = choice.unflatten(1, (config.moe_router_num_groups, -1))
        best = grouped.topk(2 if sigmoid else 1, dim=-1).values.sum(-1)
        groups = best.topk(config.moe_router_group_topk, dim=-1).indices
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
        open_experts = open_groups.unsqueeze(-1).expand_as(grouped).flatten(1)
        chosen = choice.masked_fill(~open_experts, float("-inf")).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        if sigmoid:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = (weights * config.moe_router_topk_scaling_factor).type_as(logits)
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routed
