"""Device arguments: ``device="cuda"``, ``.cuda()`` and their kin mean the CPU.

Only the functions that take a device are wrapped, each by name. A ``TorchFunctionMode`` would be
one class instead of a list, but it runs Python code for every operation of every model (about
3 us each) and keeps ``torch.compile`` from working; wrappers cost nothing where no tensor is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_eagle.compat import replace, require

CPU = torch.device("cpu")

FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full"),
    *("full_like", "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("zeros", "zeros_like"),
)
TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def redirect_devices_to_cpu() -> None:
    """Make every device argument that names a CUDA device name the CPU."""
    _keep_device_contexts_working()
    for name in FACTORIES:
        _wrap(f"torch:{name}", _cpu_factory)
    for name in TENSOR_FACTORIES:
        _wrap(f"torch:Tensor.{name}", _cpu_factory)
    _wrap("torch:Tensor.to", _cpu_move)
    _wrap("torch:Tensor.type", _cuda_type_name)
    replace("torch:Tensor.cuda", lambda tensor, *args, **kwargs: tensor)
    replace("torch:Tensor.pin_memory", lambda tensor, *args, **kwargs: tensor)
    replace("torch:Tensor.record_stream", lambda tensor, stream: None)


def on_cpu(device: Any) -> Any:
    """The CPU for an index, a ``"cuda..."`` string or a CUDA device; else ``device`` unchanged."""
    kind = type(device)
    if kind is str:
        return CPU if device.startswith("cuda") else device
    if kind is torch.device:
        return CPU if device.type == "cuda" else device
    return CPU if kind is int else device


def _wrap(path: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = require(path)
    wrapped = wrapper(original)
    functools.update_wrapper(wrapped, original)
    wrapped.__module__ = "torch"  # builtins have None here, which torch.fx cannot print
    replace(path, wrapped)


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
    """Megatron sorts parameters by the string ``"torch.cuda.FloatTensor"`` and friends.

    Upstream: megatron/core/optimizer/{optimizer,distrib_optimizer,clip_grads}.py.
    """

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        if isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _keep_device_contexts_working() -> None:
    """``with torch.device("meta"):`` recognises factories by identity, so list them unwrapped.

    ``with torch.device("cuda"):`` (megatron/core/models/common/embeddings/
    yarn_rotary_pos_embedding.py) enters the CPU instead.
    """
    require("torch.utils._device:_device_constructors")()
    original = require("torch.utils._device:DeviceContext.__init__")

    @functools.wraps(original)
    def init(self: Any, device: Any) -> None:
        original(self, on_cpu(device))

    replace("torch.utils._device:DeviceContext.__init__", init)
