"""Key/value cache of a batch of ragged sequences, the attention state of base and draft.

The slot of a key is its position. A token attends to the slots up to its own, and every forward
writes its keys before it attends. Whatever an earlier forward left behind a token (padding of a
prefill, rejected tokens, the keys of a finished draft chain) is therefore overwritten before any
token can attend to it: taking tokens back needs no operation on the cache.

B sequences, S tokens of each in a forward, n query heads, g key/value heads, d and dv head sizes of
keys and values, span: slots up to the last position of the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Hold the keys and values of ``capacity`` positions of each of B sequences, per layer.

    An ``AttentionState`` (``attention/core.py``), and an ``InputState`` (``layers/recurrent.py``)
    for layers that keep no keys. Call ``place`` before every forward.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: dict[int, Tensor] = {}  # layer -> [B, g, capacity, d]
        self._values: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}  # of recurrent layers -> [B, capacity, H]
        self._positions = torch.empty(0)
        self._biases: dict[int | None, Tensor] = {}  # by window
        self._span = 0

    def place(self, positions: Tensor) -> None:
        """Set the ``positions`` [B, S] of the next forward's tokens."""
        self._positions = positions
        self._span = int(positions.max()) + 1
        self._biases.clear()
        assert self._span <= self.capacity, f"position {self._span - 1} of {self.capacity}"

    def keep(self, sequences: Tensor) -> None:
        """Keep only the sequences of these indices, in this order."""
        for store in (self._keys, self._values, self._inputs):
            for layer, tensor in store.items():
                store[layer] = tensor[sequences]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Store ``key`` [B, g, S, d] and ``value`` [B, g, S, dv], then attend.

        Returns [B, n, S, dv]: each token of ``query`` [B, n, S, d] attends to all slots up to its
        own, or with ``window`` to the last ``window`` of them. ``sink`` [n]: learned logits of one
        more slot, whose value is zero. No collective.
        """
        keys = self._store(self._keys, layer, key)
        values = self._store(self._values, layer, value)
        batch, groups, length = key.shape[:3]
        ratio = query.shape[1] // groups
        # The heads that share a key are rows of one product: no key is ever repeated.
        grouped = query.reshape(batch, groups, ratio * length, query.shape[-1])
        mask = self._mask(grouped.dtype, ratio, window)
        if sink is not None:
            # One more slot: its key and value are zeros, so its score is the sink alone.
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
            column = sink.to(mask.dtype).view(1, groups, ratio).repeat_interleave(length, dim=2)
            column = column.expand(batch, -1, -1).unsqueeze(-1)
            mask = torch.cat([mask.expand(-1, groups, -1, -1), column], dim=-1)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, scale=scale
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def remember(self, layer: int, hidden: Tensor) -> Tensor:
        """Store the inputs [S, B, H] of a recurrent layer; return those of all slots up to the last
        position, [span, B, H]. No collective."""
        if layer not in self._inputs:
            shape = (hidden.shape[1], self.capacity, hidden.shape[2])
            self._inputs[layer] = hidden.new_zeros(shape)
        sequences = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(1)
        self._inputs[layer][sequences, self._positions] = hidden.transpose(0, 1)
        return self._inputs[layer][:, : self._span].transpose(0, 1).contiguous()

    def at_positions(self, hidden: Tensor) -> Tensor:
        """Return the rows [S, B, H] of ``hidden`` [span, B, H] that are this forward's tokens."""
        sequences = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[self._positions.t(), sequences]

    def _store(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        batch, groups, _, size = new.shape
        if layer not in store:
            # Zeros: a masked slot has weight 0, which does not silence a NaN.
            store[layer] = new.new_zeros(batch, groups, self.capacity, size)
        sequences = torch.arange(batch, device=new.device).unsqueeze(1)
        store[layer][sequences, :, self._positions] = new.transpose(1, 2)
        return store[layer][:, :, : self._span]

    def _mask(self, dtype: torch.dtype, ratio: int, window: int | None) -> Tensor:
        """Return the additive mask [B, 1, ratio * S, span], made once per forward and window."""
        if window not in self._biases:
            slots = torch.arange(self._span, device=self._positions.device)
            positions = self._positions.unsqueeze(-1)
            hidden = slots > positions
            if window is not None:
                hidden |= slots <= positions - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill_(hidden, float("-inf"))
            self._biases[window] = bias.repeat(1, ratio, 1).unsqueeze(1)
        return self._biases[window]
