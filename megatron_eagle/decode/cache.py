"""Keys and values of a batch of ragged sequences, as the attention state of base and draft.

The slot of a key is its position. A row sees the slots up to its own, and every forward writes its
rows before it reads, so whatever an earlier forward left behind a row (padding of a prefill,
rejected tokens, the keys of a finished draft chain) is overwritten before any row can see it:
taking tokens back needs no operation on the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """An :class:`~megatron_eagle.attention.core.AttentionState` for ``capacity`` positions of each
    of B sequences. Call :meth:`place` before every forward."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: dict[int, Tensor] = {}  # layer -> [B, g, capacity, d]
        self._values: dict[int, Tensor] = {}
        self._positions = torch.empty(0)
        self._biases: dict[int | None, Tensor] = {}  # by window
        self._span = 0

    def place(self, positions: Tensor) -> None:
        """The next forward's rows have these positions, [B, n]."""
        self._positions = positions
        self._span = int(positions.max()) + 1
        self._biases.clear()
        assert self._span <= self.capacity, f"position {self._span - 1} of {self.capacity}"

    def keep(self, sequences: Tensor) -> None:
        """Keep only these of the B sequences, in this order."""
        for store in (self._keys, self._values):
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
        """query [B, n, S, d] against all slots up to each row's own (the last ``window`` of them);
        key [B, g, S, d] and value [B, g, S, dv] are stored first. Returns [B, n, S, dv]."""
        keys = self._store(self._keys, layer, key)
        values = self._store(self._values, layer, value)
        batch, groups, rows = key.shape[:3]
        ratio = query.shape[1] // groups
        # The heads that share a key are rows of one product: no key is ever repeated.
        grouped = query.reshape(batch, groups, ratio * rows, query.shape[-1])
        mask = self._mask(grouped.dtype, ratio, window)
        if sink is not None:
            # One more slot: its key and value are zeros, its score is the sink's.
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
            column = sink.to(mask.dtype).view(1, groups, ratio).repeat_interleave(rows, dim=2)
            column = column.expand(batch, -1, -1).unsqueeze(-1)
            mask = torch.cat([mask.expand(-1, groups, -1, -1), column], dim=-1)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, scale=scale
        )
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def _store(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        batch, groups, _, size = new.shape
        if layer not in store:
            # Zeros: a masked slot has weight 0, which does not silence a NaN.
            store[layer] = new.new_zeros(batch, groups, self.capacity, size)
        rows = torch.arange(batch, device=new.device).unsqueeze(1)
        store[layer][rows, :, self._positions] = new.transpose(1, 2)
        return store[layer][:, :, : self._span]

    def _mask(self, dtype: torch.dtype, ratio: int, window: int | None) -> Tensor:
        """Additive, [B, 1, ratio * S, span]; the same for all layers of a forward and a window."""
        if window not in self._biases:
            slots = torch.arange(self._span, device=self._positions.device)
            rows = self._positions.unsqueeze(-1)
            hidden = slots > rows
            if window is not None:
                hidden |= slots <= rows - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill_(hidden, float("-inf"))
            self._biases[window] = bias.repeat(1, ratio, 1).unsqueeze(1)
        return self._biases[window]
