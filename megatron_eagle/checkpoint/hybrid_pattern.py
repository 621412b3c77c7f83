"""Read the pattern of a HybridModel: which layers it has, and which of them a draft may read.

One symbol stands for one layer of Megatron's: ``*`` attention, ``+`` multi-latent attention, ``G``
gated delta net, ``M`` Mamba-2, ``-`` MLP, ``E`` experts. ``|`` cuts pipeline stages; what follows
``/`` predicts further tokens and belongs to no frozen base.

The layers of a base are counted as its Hugging Face model counts them. Where every mixer is
followed by an MLP or experts and none is Mamba-2 (``*-*E``), the two are one decoder layer, as in
Llama, Mixtral or Qwen3-Next. In any other pattern every symbol is a layer, as in Nemotron-H.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SYMBOLS = "*+GM-E"
ATTENTION, LATENT, DELTA_NET, MAMBA, DENSE, EXPERTS = "*", "+", "G", "M", "-", "E"
CUT, FURTHER_TOKENS = "|", "/"
RECURRENT = (DELTA_NET, MAMBA)
"""Layers that mix positions by a recurrence, not by attention."""
_DECODER_LAYERS = re.compile(r"([*+G][-E])+")


def pattern_of(args: Mapping[str, Any]) -> str | None:
    """Return the pattern in the Megatron arguments of a base; None for a GPTModel."""
    return args.get("hybrid_layer_pattern")


def main_pattern(pattern: str) -> str:
    """Return ``pattern`` without the layers that predict further tokens."""
    return pattern.split(FURTHER_TOKENS)[0]


def symbols(pattern: str) -> str:
    """Return a symbol for each of Megatron's layers, of all stages."""
    return main_pattern(pattern).replace(CUT, "")


def layer_ends(pattern: str) -> list[int]:
    """Return for each layer of the base the 0-based index of the last symbol that it consists of:
    its output is the residual stream after that one."""
    layers = symbols(pattern)
    step = 2 if _DECODER_LAYERS.fullmatch(layers) else 1
    return list(range(step - 1, len(layers), step))


def mixers(args: Mapping[str, Any]) -> list[str]:
    """Return for each layer of an imported base, whose pattern has a pair of symbols for each, the
    symbol of what mixes its positions: ``*`` or ``G``. Layers of a GPTModel all have attention."""
    pattern = pattern_of(args)
    if pattern is None:
        return [ATTENTION] * args["num_layers"]
    return [symbols(pattern)[end - 1] for end in layer_ends(pattern)]


def megatron_layers(args: Mapping[str, Any]) -> int:
    """Return the number of layers as Megatron counts them, of a base of either kind."""
    pattern = pattern_of(args)
    return int(args["num_layers"]) if pattern is None else len(symbols(pattern))


def is_recurrent(args: Mapping[str, Any]) -> bool:
    """Return whether a base has layers that mix positions by a recurrence."""
    return any(symbol in symbols(pattern_of(args) or "") for symbol in RECURRENT)


def for_stages(pattern: str, stages: int) -> str:
    """Return ``pattern`` with its cuts if they make ``stages`` pipeline stages, else without."""
    return pattern if pattern.count(CUT) + 1 == stages else symbols(pattern)


def pattern_fault(pattern: Any) -> str | None:
    """Return None for the pattern of a base that can be built, else the words for what can."""
    fits = isinstance(pattern, str) and symbols(pattern) and set(pattern) <= {*SYMBOLS, CUT}
    if not fits or ("*" in pattern and LATENT in pattern) or "" in pattern.split(CUT):
        return f"a pattern of {' '.join(SYMBOLS)} (not both * and +), stages cut by |"
    return None
