"""Optional torch.compile of the collective-free hot regions.

A region is a function decorated with :func:`compilable`. It runs eagerly until
:func:`compile_regions` is called (``--eagle-compile``); should compilation fail, the run says so
once and that region goes on eagerly.
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
    """Compile (or stop compiling) every :func:`compilable` function from its next call on."""
    _state["enabled"] = enabled


def is_compiling() -> bool:
    """Whether regions are compiled: then one pass does what eager operators need several for."""
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
            eager = function(*args, **kwargs)  # a mistake of ours raises here, uncovered
            _say_once(function, error)
            compiled["region"] = function
            return eager

    return run


def _say_once(function: Callable[..., Any], error: Exception) -> None:
    reason = str(error).strip().splitlines()
    logger.warning(
        "--eagle-compile: %s could not be compiled and runs eagerly (%s: %s)",
        function.__name__,
        type(error).__name__,
        reason[0] if reason else "no message",
    )
