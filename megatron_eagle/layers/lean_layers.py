"""Define an RMSNorm and a gated MLP that keep little for backward, without Transformer Engine.

Parameters and results are the same as with Megatron's local modules, whose eager operators keep
every intermediate result.

Shape letters: H hidden channels, F intermediate channels of this TP rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import MLP


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm [..., H] -> [..., H], fp32 statistics; keeps its input and one number per position.

    With ``layernorm_zero_centered_gamma`` in ``config`` it multiplies by 1 + weight. Under sequence
    parallelism its weight is marked, so that its gradient is summed over TP.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.zero_centered: bool = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; differentiable in x and the weight, no collective."""
        if x.is_cuda:  # PyTorch has a fused kernel
            return self._fused(x) if self.zero_centered else super().forward(x)
        # 1 + weight in fp32: in bf16 a weight near 0 would be rounded to 1 +- 2^-8.
        factor = self.weight.float() + 1 if self.zero_centered else self.weight
        return _RMSNorm.apply(x, factor, self.eps)

    def _fused(self, x: Tensor) -> Tensor:
        factor = self.weight.float() + 1
        wide = torch.nn.functional.rms_norm(x.float(), factor.shape, factor, self.eps)
        return wide.to(x.dtype)


class GatedMLP(MLP):
    """Megatron's MLP; silu(gate) * up keeps gate and up for backward, and nothing else.

    Any other activation, and Megatron's own fused one, run as in Megatron's MLP.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP; arguments, results and collectives are Megatron's."""
        config = self.config
        swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        extra = any(x is not None for x in (*args, *kwargs.values()))
        if not swiglu or extra or config.add_bias_linear or config.bias_activation_fusion:
            return super().forward(hidden_states, *args, **kwargs)
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(gate_up))


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps x and the inverse root mean square of every position."""

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
    """silu(gate) * up of gate and up [..., 2F] -> [..., F], which keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad
