"""CUDA tensors without a device: shapes, types and schemas are checked, numbers are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake_cuda_tensors() -> Iterator[None]:
    """Fake CUDA tensors without a driver."""
    fake = "torch._subclasses.fake_tensor"
    with (
        mock.patch(f"{fake}.init_gpu_context", lambda device: None),
        mock.patch(f"{fake}.FakeTensorMode.avoid_device_init", True, create=True),
        FakeTensorMode(),
    ):
        yield
