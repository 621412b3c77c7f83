"""Import Megatron without PyTorch's compiler where there is no CUDA.

Megatron decorates small functions with ``torch.compile`` while it is imported, and that imports the
compiler: 5 of 8 seconds of a processor. Megatron's own switch, ``disable_jit_fuser``, is one of its
modules and so comes too late.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def import_megatron(module_name: str) -> ModuleType:
    """Import a module by its full name, of Megatron or not.

    The first import of Megatron in a process without CUDA leaves its fusions plain functions, as
    ``disable_jit_fuser`` means them; ``torch.compile`` itself is as before afterwards.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    first = module_name.startswith("megatron.") and "megatron.core" not in sys.modules
    if first and not _has_cuda():
        _import_uncompiled()
    return importlib.import_module(module_name)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _import_uncompiled() -> None:
    import torch

    original = torch.compile
    vars(torch)["compile"] = lambda function: function
    try:
        jit = importlib.import_module("megatron.core.jit")
    finally:
        vars(torch)["compile"] = original
    jit.disable_jit_fuser()
