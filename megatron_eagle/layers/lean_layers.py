"""RMSNorm and gated MLP that keep little for backward, for layers without Transformer Engine.

The same parameters and numbers as Megatron's local modules, whose eager operators keep every
intermediate result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import MLP


class RMSNorm(torch.nn.RMSNorm):
    """[..., H] -> [..., H], statistics in fp32; keeps its input and one number a row.

    Under sequence parallelism its weight is marked, so that its gradient is summed over TP.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # PyTorch has a fused kernel
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class GatedMLP(MLP):
    """silu(gate) * up, keeping the two and not what is made of them.

    Any other activation, and Megatron's own fused one, are left to Megatron.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        own = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        given = any(x is not None for x in (*args, *kwargs.values()))
        if not own or given or config.add_bias_linear or config.bias_activation_fusion:
            return super().forward(hidden_states, *args, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(both))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grads[0].float()
        grad_weight = torch.linalg.vecdot(grad.flatten(0, -2), normed.flatten(0, -2), dim=0)
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
        grad_x = grad.sub_(normed.mul_(mean)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad = torch.empty_like(both)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad
