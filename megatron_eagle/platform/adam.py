"""Adam that keeps its state the way Transformer Engine's ``FusedAdam`` does.

``patches.use_checkpointable_adam`` says why Megatron needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam

from megatron_eagle.errors import UserError


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW with Transformer Engine's state layout.

    Per parameter: ``exp_avg`` and ``exp_avg_sq``. Per group: ``step``, absent before the first
    step and in groups without parameters. Megatron reads exactly this layout when it saves or
    loads an optimizer (megatron/core/optimizer/distrib_optimizer.py).

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: decoupled weight decay (AdamW) when True, an L2 term (Adam) when False.
        capturable: must be False.

    Raises:
        UserError: ``capturable`` is True.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise UserError("<optimizer_cuda_graph> needs Transformer Engine's or Apex's optimizer")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` must be None."""
        assert closure is None
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        """Run one fused Adam step on the parameters of ``group`` that have gradients."""
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param) for param in params]
        done = torch.full((), float(group["step"] - 1), device=params[0].device)
        adam(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [done.clone() for _ in params],  # torch counts steps in place, one tensor each
            fused=True,
            decoupled_weight_decay=self.adam_w_mode,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parameter's moments, zeros before its first step."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
