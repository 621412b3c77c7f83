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
        self._bias: Tensor | None = None
        self._span = 0

    def place(self, positions: Tensor) -> None:
        """The next forward's rows have these positions, [B, n]."""
        self._positions = positions
        self._span = int(positions.max()) + 1
        self._bias = None
        assert self._span <= self.capacity, f"position {self._span - 1} of {self.capacity}"

    def keep(self, sequences: Tensor) -> None:
        """Keep only these of the B sequences, in this order."""
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor[sequences]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, n, S, d] against all slots up to each row's own; key, value [B, g, S, d] are
        stored first."""
        keys = self._store(self._keys, layer, key)
        values = self._store(self._values, layer, value)
        batch, groups, rows = key.shape[:3]
        ratio = query.shape[1] // groups
        # The heads that share a key are rows of one product: no key is ever repeated.
        grouped = query.reshape(batch, groups, ratio * rows, query.shape[-1])
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self._mask(grouped.dtype, ratio), scale=scale
        )
        return out.reshape(query.shape)

    def _store(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        batch, groups, _, size = new.shape
        if layer not in store:
            # Zeros: a masked slot has weight 0, which does not silence a NaN.
            store[layer] = new.new_zeros(batch, groups, self.capacity, size)
        rows = torch.arange(batch, device=new.device).unsqueeze(1)
        store[layer][rows, :, self._positions] = new.transpose(1, 2)
        return store[layer][:, :, : self._span]

    def _mask(self, dtype: torch.dtype, ratio: int) -> Tensor:
        """Additive, [B, 1, ratio * S, span]; the same for all layers of a forward."""
        if self._bias is None:
            slots = torch.arange(self._span, device=self._positions.device)
            hidden = slots > self._positions.unsqueeze(-1)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._bias = bias.masked_fill_(hidden, float("-inf")).repeat(1, ratio, 1).unsqueeze(1)
        return self._bias
