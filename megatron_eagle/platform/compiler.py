"""Compile hot regions without collectives by ``torch.compile``, if the run asks for it.

A region is a function decorated with ``compilable``. It runs eagerly until ``compile_regions`` is
called (``--eagle-compile``). If compilation fails, one warning says so and that region continues to
run eagerly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_state = {"enabled": False}


def compile_regions(enabled: bool = True) -> None:
    """Compile (or stop compiling) every ``compilable`` function from its next call on."""
    _state["enabled"] = enabled


def is_compiling() -> bool:
    """Return whether regions are compiled: a compiled region needs one pass, eager ones several."""
    return _state["enabled"]


def compilable[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Mark ``function`` (tensors in, tensors out, no collective) as a region worth compiling."""
    compiled: dict[str, Callable[P, R]] = {}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _state["enabled"]:
            return function(*args, **kwargs)
        if "region" not in compiled:
            compiled["region"] = torch.compile(function, dynamic=True)
        try:
            return compiled["region"](*args, **kwargs)
        except Exception as error:
            eager = function(*args, **kwargs)  # an error in the function itself raises here
            _warn(function, error)
            compiled["region"] = function
            return eager

    return run


def _warn(function: Callable[..., Any], error: Exception) -> None:
    reason = str(error).strip().splitlines()
    logger.warning(
        "torch.compile: %s could not be compiled and runs eagerly (%s: %s)",
        function.__name__,
        type(error).__name__,
        reason[0] if reason else "no message",
    )
