"""Captured layers: the residual stream after chosen base layers, by forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class AuxCapture:
    """Hooks that keep the outputs of ``layers`` (0-based ids, global over pipeline stages).

    A TransformerLayer's output is the residual stream after the layer, before any final norm:
    [S, B, H], this rank's part of S under sequence parallelism. Of a layer that another pipeline
    stage holds, this stage captures nothing.
    """

    def __init__(self, decoder: Any, layers: Sequence[int]) -> None:
        self._captured: dict[int, Tensor] = {}
        self.layers = tuple(layers)
        here = {layer.layer_number - 1 for layer in decoder.layers}
        self.layers_here = tuple(i for i in self.layers if i in here)
        for layer in decoder.layers:
            index = layer.layer_number - 1
            if index in self.layers:
                layer.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def capture(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._captured[index] = hidden.detach()

        return capture

    def take(self) -> dict[int, Tensor]:
        """The last forward's captures of the layers that this stage holds, [S', B, H] each, and
        forget them."""
        captured, self._captured = self._captured, {}
        missing = [i for i in self.layers_here if i not in captured]
        assert not missing, f"layers {missing} were not run"
        return captured
