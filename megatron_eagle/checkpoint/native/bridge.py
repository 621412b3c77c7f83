"""Megatron-Bridge's ``run_config.yaml``: the fields of its model as Megatron's arguments.

The file is read as plain YAML. ``_target_`` names a class or function; it is compared, never
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.errors import UserError, literal

FILE = "run_config.yaml"
LARGEST = 16 * 2**20

RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
"""Fields of Bridge's providers -> Megatron's arguments; other fields have the same name."""

_ACTIVATIONS = {"silu": "swiglu", "quick_gelu": "quick_geglu", "squared_relu": "squared_relu"}
_SCALED = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")


def bridge_args(path: Path) -> dict[str, Any]:
    """Return the model's arguments by Megatron's names; ``of_bridge`` is true among them.

    Raises ``UserError`` naming the file for one that cannot be read or describes no GPT.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{literal(path)}: larger than any configuration")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{literal(path)}: not plain YAML ({type(error).__name__}); nothing else is read"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise UserError(f"{literal(path)}: has no section 'model'")
    named = {str(name): value for name, value in model.items()}
    args: dict[str, Any] = {RENAMED.get(name, name): value for name, value in named.items()}
    args |= _sizes(args, str(path)) | _activation(model, literal(path))
    tokenizer = content.get("tokenizer")
    if isinstance(tokenizer, dict):
        names = ("tokenizer_type", "tokenizer_model")
        args |= {name: tokenizer.get(name) for name in names}
    if "share_embeddings_and_output_weights" in model:
        tied = bool(model["share_embeddings_and_output_weights"])
        args["untie_embeddings_and_output_weights"] = not tied
    _check_scaled(model, args, literal(path))
    return {**args, "of_bridge": True}


def _sizes(args: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the sizes that Megatron derives from others when they are null."""
    hidden, heads = args.get("hidden_size"), args.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or heads < 1:
        return {}  # named later, with everything else that is missing
    groups = args.get("num_query_groups")
    return {
        "ffn_hidden_size": args.get("ffn_hidden_size") or 4 * hidden,
        "kv_channels": args.get("kv_channels") or hidden // heads,
        "group_query_attention": groups not in (None, heads),
    }


def _activation(model: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the flags of the activation from its function's name and ``gated_linear_unit``."""
    function = model.get("activation_func")
    target = function.get("_target_") if isinstance(function, dict) else function
    name = str(target or "gelu").rpartition(".")[2]
    gated = bool(model.get("gated_linear_unit", False))
    flags = dict.fromkeys(("swiglu", "squared_relu", "quick_geglu"), False)
    if name == "gelu" and not gated:
        return {**flags, "bias_gelu_fusion": bool(model.get("bias_activation_fusion"))}
    if name not in _ACTIVATIONS or gated == (name == "squared_relu"):
        raise UserError(
            f"{source}: activation_func {literal(name)}, gated_linear_unit {gated} is not supported"
        )
    return {**flags, _ACTIVATIONS[name]: True}


def _check_scaled(model: Mapping[str, Any], args: dict[str, Any], source: str) -> None:
    """Read the scaled rope of Bridge's Llama 3 providers, which carry its constants as fields."""
    if model.get("scale_factor") is None:
        return
    constants = [float(model.get(name, 0)) for name in _SCALED[1:]]
    if constants != [1.0, 4.0, 8192.0]:
        raise UserError(f"{source}: {', '.join(_SCALED)} other than Llama 3's are not supported")
    args |= {"use_rope_scaling": True, "rope_scaling_factor": float(model["scale_factor"])}
