"""Aux hidden states: the residual stream after chosen base layers, captured by forward hooks.

Shapes: S' this rank's part of the sequence, B batch, H hidden size, A aux layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class AuxCapture:
    """Hooks that keep the outputs of the aux ``layers`` (0-based ids, global over pipeline stages).

    A TransformerLayer's output is the residual stream after the layer, before any final norm:
    [S', B, H]. Layers that another pipeline stage holds are captured there. A layer of a
    HybridModel may be several of Megatron's: ``ends`` has for each layer the 0-based number of the
    last of them; None if layers count as Megatron's.

    Attributes:
        layers: ids of all aux layers.
        local_layers: ids of those that this pipeline stage holds.
        enabled: whether the hooks keep anything.
        handles: of the hooks, to remove them.
    """

    def __init__(
        self, decoder: Any, layers: Sequence[int], ends: Sequence[int] | None = None
    ) -> None:
        self._captured: dict[int, Tensor] = {}
        self.enabled = True
        self.layers = tuple(layers)
        held = {layer.layer_number - 1: layer for layer in decoder.layers}
        numbers = {i: i if ends is None else ends[i] for i in self.layers}
        self.local_layers = tuple(i for i in self.layers if numbers[i] in held)
        self.handles = [
            held[numbers[i]].register_forward_hook(self._hook(i)) for i in self.local_layers
        ]

    def _hook(self, index: int) -> Callable[[Any, Any, Any], None]:
        def capture(_module: Any, _inputs: Any, output: Any) -> None:
            if self.enabled:
                hidden = output[0] if isinstance(output, tuple) else output
                self._captured[index] = hidden.detach()

        return capture

    def take(self) -> dict[int, Tensor]:
        """Return the last forward's aux hidden states of the local layers by layer id, [S', B, H]
        each, and forget them."""
        captured, self._captured = self._captured, {}
        missing = [i for i in self.local_layers if i not in captured]
        assert not missing, f"layers {missing} were not run"
        return captured


@dataclass(frozen=True)
class BaseOutputs:
    """Inputs of draft and teacher from the base for one micro-batch.

    features [S', B, A * H]: the aux hidden states side by side; without aux layers (EAGLE-1) the
    final hidden. final_hidden [S', B, H]: the base's output, after its final norm.
    """

    features: Tensor
    final_hidden: Tensor

    @classmethod
    def of(cls, aux_hidden: Sequence[Tensor], final_hidden: Tensor) -> BaseOutputs:
        """Concatenate the aux hidden states [S', B, H], given by ascending layer."""
        features = torch.cat(list(aux_hidden), dim=-1) if aux_hidden else final_hidden
        return cls(features, final_hidden)
