"""The base when its hidden states come from disk: embedding, output layer and RoPE, no layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.teacher.base import FrozenBase


def config_without_layers(config: Any) -> Any:
    """Return ``config`` for a base with one plain layer, which :func:`without_layers` takes out
    again. Building the rest as Megatron does keeps its vocabulary padding and its RoPE variant."""
    config = copy.copy(config)
    config.num_layers = 1
    config.num_moe_experts = None
    config.moe_layer_freq = 1
    return config


def info_without_layers(info: BaseInfo) -> BaseInfo:
    """Return the description of a base for that configuration: of a GPTModel, whose embedding,
    output layer and RoPE are a HybridModel's, too."""
    args = {n: v for n, v in info.megatron_args.items() if n != "hybrid_layer_pattern"}
    return replace(info, megatron_args={**args, "num_layers": 1})


def without_layers(gpt: Any) -> Any:
    """Take the layers out of a GPTModel, which then keeps its embedding and output layer alone."""
    gpt.decoder = _NoLayers()
    return gpt


class _NoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()


class OfflineBase(FrozenBase):
    """The base's embedding, output layer and RoPE, beside hidden states from disk.

    ``gpt`` is without layers; ``layer_sizes`` are the typical RMS of each aux layer, as measured
    when the features were extracted.
    """

    def __init__(
        self, gpt: Any, aux_layers: Sequence[int], vocab_size: int, layer_sizes: Sequence[float]
    ) -> None:
        super().__init__(gpt, aux_layers, vocab_size)
        self._layer_sizes = torch.tensor(layer_sizes)

    def run_stage(self, *_: Any) -> Any:
        raise AssertionError("hidden states come from disk")

    def layer_sizes(self, *_: Any) -> Tensor:
        return self._layer_sizes.to(self.embedding_weight.device)
