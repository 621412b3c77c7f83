"""Layers that mix positions by a recurrence: gated delta net and Mamba-2 inside a frozen base.

Megatron's kernels of both need a CUDA device and packages of their own. Of the gated delta net
Megatron has a plain PyTorch version, which takes their place elsewhere.

Shape letters: S positions, B sequences, H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_eagle.compat import GatedDeltaNet, patch_all, require
from megatron_eagle.errors import UserError

_COMMON = "megatron.core.ssm.gated_delta_net.common"


class InputState(Protocol):
    """Memory of a layer's inputs at earlier positions, such as a decoding cache."""

    def remember(self, layer: int, hidden: Tensor) -> Tensor:
        """Keep ``hidden`` [S, B, H] of ``layer``; return those of all positions so far."""
        ...

    def at_positions(self, hidden: Tensor) -> Tensor:
        """Return the rows of the forward's own positions, [S, B, H]."""
        ...


class _RemembersInputs:
    """Layer that, given an ``InputState`` as ``attention_mask``, runs on all inputs so far.

    A rejected token leaves no state behind, as it leaves no key behind in attention. The price is a
    recurrence over the whole context in every forward.
    """

    layer_number: int

    def forward(
        self, hidden_states: Tensor, attention_mask: InputState | None = None, **kwargs: Any
    ) -> Any:
        """Run the layer on ``hidden_states`` [S, B, H], after what the state remembers."""
        run: Any = super().forward  # type: ignore[misc]
        if attention_mask is None:
            return run(hidden_states=hidden_states, attention_mask=None, **kwargs)
        inputs = attention_mask.remember(self.layer_number, hidden_states)
        output = run(hidden_states=inputs, attention_mask=None, **kwargs)
        if isinstance(output, tuple):  # a TransformerLayer's, which the stack unpacks
            return attention_mask.at_positions(output[0]), *output[1:]
        return attention_mask.at_positions(output)


def remembering(layer: type) -> type:
    """Return Megatron's ``layer`` class, which decodes by remembering its inputs."""
    return type(f"Remembering{layer.__name__}", (_RemembersInputs, layer), {})


class TorchGatedDeltaNet(GatedDeltaNet):
    """Megatron's gated delta net, computed by its own plain PyTorch version on any device."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.deterministic_mode = True  # what chooses that version
        super().__init__(config, *args, **kwargs)


class _WideDecay:
    """Gated delta net whose decay is computed in fp32 of weights of any dtype.

    Megatron takes the exponential of ``A_log`` in the weight's dtype, as it does in training.
    """

    def _compute_g_and_beta(self, a_log: Tensor, dt_bias: Tensor, *gates: Tensor) -> Any:
        compute: Any = super()._compute_g_and_beta  # type: ignore[misc]
        return compute(a_log.float(), dt_bias.float(), *gates)


def delta_net(native: bool) -> type:
    """Return the class of gated delta nets on this machine: Megatron's with its kernels, or the
    plain one, for which Megatron's check for the kernels' package is taken away.

    ``native``: Megatron trained the base; the decay of any other is computed as Hugging Face does.
    """
    found: type = GatedDeltaNet
    has_kernels = require(f"{_COMMON}:chunk_gated_delta_rule") is not None
    if not (has_kernels and torch.cuda.is_available()):
        patch_all(
            {f"{_COMMON}:HAVE_FLA": True, f"{_COMMON}:l2norm": _l2norm},
            "gated delta nets without flash-linear-attention",
        )
        found = TorchGatedDeltaNet
    return found if native else type(f"Wide{found.__name__}", (_WideDecay, found), {})


def check_mamba() -> None:
    """Raise ``UserError`` unless the kernels of Mamba-2 layers are installed."""
    mixer = "megatron.core.ssm.mamba_mixer"
    if not require(f"{mixer}:HAVE_MAMBA_SSM") or require(f"{mixer}:causal_conv1d_fn") is None:
        raise UserError(
            "<base_checkpoint>: a base with Mamba-2 layers (M in its hybrid_layer_pattern) needs "
            "the packages mamba_ssm and causal_conv1d, which are not installed"
        )


def _l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide the last axis by its length, as flash-linear-attention does."""
    squares = x.float().square().sum(-1, keepdim=True)
    return (x * torch.rsqrt(squares + eps)).to(x.dtype)
