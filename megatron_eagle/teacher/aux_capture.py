"""Capture of aux hidden states: the residual stream after chosen base layers, by forward hooks.

Shapes: S' this rank's part of the sequence, B batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class AuxCapture:
    """Hooks that keep the outputs of the aux ``layers`` (0-based ids, global over pipeline stages).

    A TransformerLayer's output is the residual stream after the layer, before any final norm:
    [S', B, H]. Layers that another pipeline stage holds are captured there.

    Attributes:
        layers: ids of all aux layers.
        local_layers: ids of those that this pipeline stage holds.
    """

    def __init__(self, decoder: Any, layers: Sequence[int]) -> None:
        self._captured: dict[int, Tensor] = {}
        self.layers = tuple(layers)
        held = {layer.layer_number - 1 for layer in decoder.layers}
        self.local_layers = tuple(i for i in self.layers if i in held)
        for layer in decoder.layers:
            index = layer.layer_number - 1
            if index in self.layers:
                layer.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[Any, Any, Any], None]:
        def capture(_module: Any, _inputs: Any, output: Any) -> None:
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
