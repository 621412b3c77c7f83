"""Make device arguments mean the CPU: ``device="cuda"``, ``.cuda()`` and the like.

Only the functions that take a device are wrapped, each by name. A ``TorchFunctionMode`` would be
one class instead of a list, but it runs Python code for every operation of every model (about
3 us each) and keeps ``torch.compile`` from working; wrappers cost nothing where no tensor is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_eagle.compat import patch, patch_all, require

CPU = torch.device("cpu")

FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full"),
    *("full_like", "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("zeros", "zeros_like"),
)
TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

LAST_PATCHED = "torch:Tensor.cuda"
"""The path that ``redirect_devices_to_cpu`` patches last."""


def redirect_devices_to_cpu() -> None:
    """Make every device argument that names a CUDA device name the CPU."""
    _keep_device_contexts_working()
    factories = [f"torch:{name}" for name in FACTORIES]
    factories += [f"torch:Tensor.{name}" for name in TENSOR_FACTORIES]
    patch_all(
        {
            **{path: _like_torch(_cpu_factory, require(path)) for path in factories},
            "torch:Tensor.to": _like_torch(_cpu_move, require("torch:Tensor.to")),
            "torch:Tensor.type": _like_torch(_cuda_type_name, require("torch:Tensor.type")),
            "torch:Tensor.pin_memory": lambda tensor, *args, **kwargs: tensor,
            "torch:Tensor.record_stream": lambda tensor, stream: None,
            LAST_PATCHED: lambda tensor, *args, **kwargs: tensor,
        },
        "a CUDA device means the CPU",
    )


def on_cpu(device: Any) -> Any:
    """Return the CPU for an index, a ``"cuda..."`` string or a CUDA device, else ``device``."""
    kind = type(device)
    if kind is str:
        return CPU if device.startswith("cuda") else device
    if kind is torch.device:
        return CPU if device.type == "cuda" else device
    return CPU if kind is int else device


def _like_torch(
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]], original: Callable[..., Any]
) -> Callable[..., Any]:
    """Return ``wrapper(original)`` under the name of the ``original``."""
    wrapped = wrapper(original)
    functools.update_wrapper(wrapped, original)
    wrapped.__module__ = "torch"  # builtins have None here, which torch.fx cannot print
    return wrapped


def _cpu_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if kwargs.get("device") is not None:
                kwargs["device"] = on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _cpu_move(original: Callable[..., Any]) -> Callable[..., Any]:
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (on_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        return original(tensor, *args, **kwargs)

    return to


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Name CUDA types: Megatron sorts parameters by strings like ``"torch.cuda.FloatTensor"``.

    Upstream: megatron/core/optimizer/{optimizer,distrib_optimizer,clip_grads}.py.
    """

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        if isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _keep_device_contexts_working() -> None:
    """Keep ``with torch.device(...)`` working: "meta" as it is, "cuda" entering the CPU.

    It recognises factories by identity, from a list that PyTorch makes on first use: it is made
    here, before the factories are wrapped. "cuda" is entered in megatron/core/models/common/
    embeddings/yarn_rotary_pos_embedding.py.
    """
    require("torch.utils._device:_device_constructors")()
    path = "torch.utils._device:DeviceContext.__init__"
    original = require(path)

    @functools.wraps(original)
    def init(self: Any, device: Any) -> None:
        original(self, on_cpu(device))

    patch(path, init, "a context of a CUDA device means the CPU")
