"""A base's description as the configuration objects of Megatron's own model builder.

Megatron's parser gives every argument that the description leaves out, so that a base is built as
Megatron's trainer builds it. ``compat`` imports what belongs to the trainer.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers
from megatron_eagle.checkpoint.layer_blocks import BLOCKS, PATH
from megatron_eagle.compat import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron_eagle.teacher.megatron_parser import megatron_parser

STORED_AS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""Flags that Megatron's parser stores under another name."""

_PLAIN_KERNELS: dict[str, Any] = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "params_dtype": torch.float32,
}
"""Arguments of a base outside the trainer: fp32, Megatron-Core's own modules, nothing fused."""

_PARALLELISM = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "pipeline_dtype": "params_dtype",
}
"""Fields of TransformerConfig that arguments have under another name."""


@cache
def _parser_defaults() -> dict[str, Any]:
    return vars(megatron_parser().parse_args([]))


def base_arguments(info: BaseInfo, **parallelism: Any) -> argparse.Namespace:
    """Return Megatron's arguments of the base, everything else as its parser's defaults.

    ``parallelism`` are fields of TransformerConfig such as ``tensor_model_parallel_size``.
    """
    values = _parser_defaults() | _PLAIN_KERNELS
    for name, value in info.megatron_args.items():
        values[STORED_AS.get(name, name)] = value
    values["num_layers"] = megatron_layers(info.megatron_args)
    if BLOCKS in info.megatron_args:
        values[PATH] = ""
    if values["window_size"] is not None:
        values["window_size"] = tuple(values["window_size"])
    values |= {_PARALLELISM.get(name, name): value for name, value in parallelism.items()}
    return argparse.Namespace(**values)


def transformer_config(args: argparse.Namespace) -> Any:
    """Return the TransformerConfig (of the kind that the arguments ask for) of ``args``."""
    return core_transformer_config_from_args(args)


def model_config(info: BaseInfo, config: Any) -> Any:
    """Return Megatron's GPTModelConfig of the base around its TransformerConfig ``config``, or its
    HybridModelConfig."""
    args = base_arguments(info)
    args.padded_vocab_size = info.vocab_size  # the caller pads it for its layout
    if args.hybrid_layer_pattern is not None:
        return hybrid_config_from_args(args, config)
    model = gpt_config_from_args(args, config)
    # Megatron's own trainer drops this argument.
    model.rope_scaling_factor = args.rope_scaling_factor
    return model
