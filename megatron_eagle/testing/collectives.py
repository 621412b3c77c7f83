"""Counting of the collectives that a rank takes part in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveCounter(TorchDispatchMode):
    """Count the c10d operations called inside this context.

    calls: by operation, such as ``allreduce`` or ``allgather_base``.
    gathered: elements of each all-gather's input, in order.
    bytes: bytes that this rank puts into all operations together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.gathered: list[int] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            # These take their output first.
            output_first = name.endswith("base") or name.startswith("allgather")
            sent = args[1] if output_first else args[0]
            tensors = sent if isinstance(sent, list) else [sent]
            self.calls[name] += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if name == "allgather_base":
                self.gathered.append(sent.numel())
        return func(*args, **(kwargs or {}))
