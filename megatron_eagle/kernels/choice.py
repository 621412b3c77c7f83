"""Choose between an eager function and the Triton kernel that stands in for it.

A function decorated with ``with_kernel`` runs its kernel on a CUDA tensor if Triton is installed
(``--eagle-kernels auto``), always (``triton``) or never (``eager``). With ``auto`` a kernel that
fails before it has run says so once, and its eager function runs from then on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.platform.compiler import is_compiling

logger = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "eager")
_state: dict[str, Any] = {"choice": "auto", "failed": set()}


def choose_kernels(choice: str) -> None:
    """Set what decorated functions run from now on.

    Raises:
        UserError: ``triton`` is asked for and not installed.
    """
    assert choice in CHOICES
    if choice == "triton" and not triton_is_installed():
        raise UserError("<kernels> triton: Triton is not installed")
    _state["choice"], _state["failed"] = choice, set()


@functools.cache
def triton_is_installed() -> bool:
    """Tell whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def runs_kernel(x: Tensor) -> bool:
    """Tell whether kernels run on ``x``: on a CUDA tensor, or, asked for by name, on any tensor in
    Triton's interpreter."""
    choice = _state["choice"]
    if choice == "eager" or is_compiling() or not triton_is_installed():
        return False
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return x.is_cuda or interpreted


def with_kernel[**P, R](path: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a kernel stand in for the decorated function, whose first argument is a tensor.

    ``path``: "module:function" of its launcher, of the same arguments, imported when first called.
    """

    def decorate(eager: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(eager)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            x = args[0]
            assert isinstance(x, Tensor)
            if path in _state["failed"] or not runs_kernel(x):
                return eager(*args, **kwargs)
            try:
                result: R = _launcher(path)(*args, **kwargs)
            except Exception as error:
                if _state["choice"] != "auto":
                    raise
                _state["failed"].add(path)
                _warn(path, error)
                return eager(*args, **kwargs)
            return result

        return run

    return decorate


@functools.cache
def _launcher(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return launcher


def _warn(path: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()
    logger.warning(
        "Triton: %s could not be launched and runs eagerly (%s: %s)",
        path,
        type(error).__name__,
        reason[0] if reason else "no message",
    )
