"""Megatron arguments as a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import megatron_layers
from megatron_eagle.checkpoint.layer_blocks import BLOCKS, PATH

_OFF = {"add_bias_linear": "--disable-bias-linear", "bias_gelu_fusion": "--no-bias-gelu-fusion"}
"""Arguments that are on by default -> the flag that turns them off."""


def megatron_flags(args: Mapping[str, Any]) -> list[str]:
    """Return the flags that make Megatron's parser give ``args``; values that are off need none."""
    words: list[str] = []
    for name, value in args.items():
        if name == "num_layers":
            words += [_flag(name), str(megatron_layers(args))]
        elif name == "hybrid_layer_pattern":  # which may look like a flag
            words.append(f"{_flag(name)}={value}")
        elif name == BLOCKS:  # whose parser asks for the other two as well
            words += [_flag(PATH), "", _flag(name), value, "--use-rotary-position-embeddings"]
        elif name in _OFF:
            words += [] if value else [_OFF[name]]
        elif isinstance(value, bool):
            words += [_flag(name)] if value else []
        elif name == "window_size":
            words += [_flag(name), ",".join(map(str, value))]
        elif isinstance(value, list):
            words += [_flag(name), "[" + ",".join(map(str, value)) + "]"]
        else:
            words += [_flag(name), str(value)]
    return words


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
