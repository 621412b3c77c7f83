"""Set rotary embeddings that Megatron's flags cannot express: other constants, other scalings.

A description is what eagle_base.json holds as "rope": rope_type, rope_theta, and every number that
this type needs. The frequencies follow the definitions of Hugging Face's modeling_rope_utils
(linear; llama3; yarn, arXiv 2309.00071). They replace the frequencies of the Megatron module, which
does everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Rope = Mapping[str, Any]


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """Return [dim / 2] fp32: radians per position of each pair of the ``dim`` rotated channels."""
    base = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kinds = {"default": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
    return kinds[rope["rope_type"]](base, rope, dim)


def attention_factor(rope: Rope) -> float:
    """Return the factor of cos and sin, for queries and keys alike."""
    return rope.get("attention_factor", 1.0)


def set_frequencies(module: Any, rope: Rope) -> None:
    """Give a Megatron RotaryEmbedding the frequencies of ``rope``."""
    module.inv_freq = inverse_frequencies(rope, 2 * module.inv_freq.numel()).to(module.inv_freq)


def set_attention_factor(config: Any, factor: float) -> None:
    """Make the attention layers of a TransformerConfig multiply cos and sin by ``factor``.

    Megatron has no such option: it derives the factor from three yarn numbers as
    1 + 0.1 * mscale * log(scaling_factor), so these are chosen to give the factor. With a scaling
    factor of exp(10) the formula is 1 + mscale.
    """
    if factor != 1.0:
        config.yarn_rotary_scaling_factor = math.exp(10)
        config.yarn_mscale = factor - 1.0
        config.yarn_mscale_all_dim = 0.0


def _unscaled(base: Tensor, rope: Rope, dim: int) -> Tensor:
    """Return the frequencies as they are."""
    return base


def _linear(base: Tensor, rope: Rope, dim: int) -> Tensor:
    """Slow all frequencies down by the factor."""
    return base / rope["factor"]


def _llama3(base: Tensor, rope: Rope, dim: int) -> Tensor:
    """Slow low frequencies down by the factor, high ones not, those between in part."""
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (kept + (1 - kept) / rope["factor"])


def _yarn(base: Tensor, rope: Rope, dim: int) -> Tensor:
    """Slow frequencies down as ``_llama3``, with a ramp over channels instead of wave lengths."""

    def channel(turns: float) -> float:
        """Return the channel pair that makes ``turns`` turns over the original context."""
        length = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(rope["rope_theta"]))

    low, high = channel(rope["beta_fast"]), channel(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return base * (1 - slowed + slowed / rope["factor"])
