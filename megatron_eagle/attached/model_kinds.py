"""What Megatron's GPTModel and HybridModel in memory say in different ways."""

from __future__ import annotations

from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import layer_ends, main_pattern, pattern_fault
from megatron_eagle.errors import UserError, literal


def pattern_of_model(gpt: Any) -> str | None:
    """Return the layers of a HybridModel, without those that predict further tokens; None for a
    GPTModel.

    Raises ``UserError`` for layers that the description of a base does not know.
    """
    pattern = getattr(gpt, "hybrid_layer_pattern", None)
    if pattern is None:
        return None
    pattern = main_pattern(pattern)
    if wanted := pattern_fault(pattern):
        raise UserError(
            f"<hybrid_layer_pattern> {literal(pattern)} of <model>: not supported, only {wanted}"
        )
    return pattern


def ends_of_model(gpt: Any) -> list[int] | None:
    """Return for each layer of a HybridModel, as its Hugging Face model counts them, the 0-based
    number of Megatron's last layer in it; None for a GPTModel, whose layers count as Megatron's."""
    pattern = pattern_of_model(gpt)
    return None if pattern is None else layer_ends(pattern)


def layers_of_model(gpt: Any) -> int:
    """Return the number of layers, those of a HybridModel as its Hugging Face model counts them."""
    ends = ends_of_model(gpt)
    return int(gpt.config.num_layers) if ends is None else len(ends)


def rotary_percent(gpt: Any) -> float:
    """Return the part of a head that RoPE turns; a HybridModel keeps only the frequencies."""
    if hasattr(gpt, "rotary_percent"):
        return float(gpt.rotary_percent)
    module = getattr(gpt, "rotary_pos_emb", None)
    return 1.0 if module is None else 2 * module.inv_freq.numel() / gpt.config.kv_channels


def rotary_base(gpt: Any) -> float:
    """Return RoPE's base; that of a HybridModel follows from its lowest frequency, which is in
    fp32, so to six digits."""
    if gpt.config.multi_latent_attention:
        return float(gpt.config.rotary_base)
    if hasattr(gpt, "rotary_base"):
        return float(gpt.rotary_base)
    module = getattr(gpt, "rotary_pos_emb", None)
    if module is None or module.inv_freq.numel() < 2:
        return 10000.0  # no frequency depends on it
    pairs = module.inv_freq.numel()
    return float(f"{float(module.inv_freq[-1]) ** (-pairs / (pairs - 1)):.6g}")
