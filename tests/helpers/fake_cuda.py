"""CUDA without a GPU: fake tensors that know their device, shape and dtype but hold no data.

Operations on two devices, and operations whose result the host would have to wait for, raise. It
shows that code reaches CUDA's kernels with legal arguments, not that they compute the right thing.
For use inside a rank of ``run_distributed``, whose process ends afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from megatron_eagle.compat import patch_all

DEVICE = torch.device("cuda:0")


def fake_cuda(world_size: int) -> Any:
    """The context of fake tensors; this process believes in one CUDA device and ``world_size``
    ranks, whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    random = "megatron.core.tensor_parallel.random"
    patch_all(
        {
            "torch.cuda:is_available": lambda: True,
            "torch.cuda:current_device": lambda: 0,
            "torch.cuda:device_count": lambda: 1,
            "torch.cuda:manual_seed": lambda seed: None,
            "torch.cuda:get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            "torch:Tensor.pin_memory": lambda tensor, *args: tensor,
            "torch.nn:Module.cuda": lambda module, *args: _move(module, lambda t: t.to(DEVICE)),
            "torch.nn:Module.bfloat16": lambda module: _move(module, _bfloat16),
            f"{random}:_get_cuda_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            f"{random}:_set_cuda_rng_state": lambda *args, **kwargs: None,
            f"{random}:CudaRNGStatesTracker.fork": lambda *args: contextlib.nullcontext(),
            # Fake tensors would look for a real device to go by.
            "torch._subclasses.fake_tensor:init_gpu_context": lambda device: None,
            "torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init": True,
        },
        "a CUDA device of fake tensors",
    )
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def _bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _move(root: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> torch.nn.Module:
    """``Module._apply`` for fake parameters, which cannot be swapped in place."""
    for module in root.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
                for key, value in vars(old).items():
                    vars(new).setdefault(key, value)  # Megatron's marks, not the fake device
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return root


class RecordedFunctions:
    """Runs the autograd functions of modules named ``prefix...`` without autograd's engine, which
    would want a driver, and afterwards their backwards by hand."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._calls: list[tuple[Any, _Context, tuple, Any]] = []

    def __enter__(self) -> RecordedFunctions:
        original = torch.autograd.Function.apply
        recorded = self._calls

        def apply(cls: Any, *args: Any) -> Any:
            if not cls.__module__.startswith(self.prefix):
                return original.__func__(cls, *args)
            context = _Context()
            context.needs_input_grad = tuple(
                isinstance(arg, Tensor) and arg.is_floating_point() for arg in args
            )
            with torch.no_grad():
                output = cls.forward(context, *args)
            recorded.append((cls, context, args, output))
            return output

        self._patch = mock.patch.object(torch.autograd.Function, "apply", classmethod(apply))
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()

    @torch.no_grad()
    def check_gradients(self) -> set[str]:
        """Run every recorded backward: gradients are like their inputs. The functions' modules."""
        for cls, context, args, output in reversed(self._calls):
            outputs = output if isinstance(output, tuple) else (output,)
            gradients = cls.backward(context, *outputs)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for gradient, value in zip(gradients, args, strict=True):
                if gradient is not None:
                    assert gradient.shape == value.shape and gradient.dtype == value.dtype, cls
                    assert gradient.device == DEVICE, cls
        return {cls.__module__ for cls, *_ in self._calls}


class _Context:
    """Stands for an autograd function's ``ctx``."""

    saved_tensors: tuple[Any, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
