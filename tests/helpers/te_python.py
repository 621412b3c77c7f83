"""The real Python of Transformer Engine on a CPU: its compiled part is a stand-in.

``transformer-engine`` is a wheel of Python files alone; its kernels are in other packages, which
need CUDA. Here its modules are imported from those files (``tools/setup_env.sh`` puts them beside
the environment, not into it: Megatron would take them for an installation), so that their
constructors, parameter names, checkpoints and arguments are what a GPU sees. Their forwards, which
would call kernels, compute the same in plain PyTorch, without tensor parallelism; its optimizer is
its own, on kernels in plain PyTorch.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from tests.helpers.te_optimizer_kernels import optimizer_kernels

ABSENT = (
    "onnxscript", "onnx_ir", "onnx", "einops", "nvdlfw_inspect", "nvdlfw_inspect.api",
    "nvdlfw_inspect.logging", "nvdlfw_inspect.base", "nvdlfw_inspect.registry",
    "nvdlfw_inspect.utils",
)  # fmt: skip
"""What Transformer Engine imports and a bf16 run does not use."""
FIRST_MICROBATCH: list[Any] = []
"""The ``is_first_microbatch`` of every call of a linear layer."""


def te_folder() -> Path | None:
    """The folder of the unpacked wheel, if there is one."""
    folder = Path(os.environ.get("TE_PYTHON", Path(sys.prefix) / "transformer-engine"))
    return folder if (folder / "transformer_engine").is_dir() else None


def install_te() -> Any:
    """Import ``transformer_engine`` with a stand-in for its compiled part, before Megatron."""
    assert "megatron" not in sys.modules, "Megatron has looked for Transformer Engine already"
    folder = te_folder()
    assert folder is not None
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for libraries
    sys.modules["transformer_engine_torch"] = _compiled_part()
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ImportError:
            fake: Any = MagicMock(name=name)
            fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
            fake.__path__ = []
            sys.modules[name] = fake
    (wheel,) = folder.glob("transformer_engine-*.dist-info")
    version = wheel.name.removesuffix(".dist-info").split("-")[1]
    package: Any = types.ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    package.__version__ = version
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    package.__spec__.submodule_search_locations = package.__path__
    sys.modules["transformer_engine"] = package
    real = importlib.metadata.version

    def installed(name: str) -> str:
        ours = name.replace("_", "-").startswith("transformer-engine")
        return version if ours else real(name)

    importlib.metadata.version = installed
    package.common = importlib.import_module("transformer_engine.common")
    package.common.load_framework_extension = lambda framework: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")
    _compute_in_torch(package.pytorch)
    return package


def _compute_in_torch(pytorch: Any) -> None:
    """Replace the forwards of Transformer Engine's modules by the same in plain PyTorch."""

    def product(module: Any, x: Tensor, is_first_microbatch: Any) -> Any:
        FIRST_MICROBATCH.append(is_first_microbatch)
        bias = module.bias if module.use_bias else None
        if not module.return_bias:
            return torch.nn.functional.linear(x, module.weight, bias)
        return torch.nn.functional.linear(x, module.weight), bias

    def linear(module: Any, x: Tensor, is_first_microbatch: Any = None, **_: Any) -> Any:
        return product(module, x, is_first_microbatch)

    def norm_linear(module: Any, x: Tensor, is_first_microbatch: Any = None, **_: Any) -> Any:
        weight = module.layer_norm_weight + module.zero_centered_gamma
        normed = torch.nn.functional.rms_norm(x, weight.shape, weight, module.eps)
        return product(module, normed, is_first_microbatch)

    def norm(module: Any, x: Tensor) -> Tensor:
        weight = module.weight + module.zero_centered_gamma
        return torch.nn.functional.rms_norm(x, weight.shape, weight, module.eps)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        assert module.qkv_format == "sbhd" and module.window_size in (None, (-1, -1), (-1, 0))
        assert module.softmax_type == "vanilla" and options.pop("attn_mask_type") == "causal"
        assert not options, options
        rows, columns, weights = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            rows, columns, weights, is_causal=True, scale=module.softmax_scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)

    pytorch.DotProductAttention.forward = attention
    pytorch.Linear.forward = linear
    pytorch.LayerNormLinear.forward = norm_linear
    pytorch.RMSNorm.forward = norm


class _NamedNumber(int):
    """A member of an enumeration of the compiled part, whose value nobody compares."""


class _Enumeration(type):
    """The metaclass of such an enumeration: any member it is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _NamedNumber(len(vars(cls)))
        setattr(cls, name, member)
        return member


class _CompiledPart(types.ModuleType):
    """Any class that is asked for, and functions that fail when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: Any = _Enumeration(name, (), {"__init__": lambda self, *args, **kwargs: None})
        else:

            def made(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError(f"transformer_engine_torch.{name} was called without CUDA")

        setattr(self, name, made)
        return made


def _compiled_part() -> Any:
    part: Any = _CompiledPart("transformer_engine_torch")
    dtypes = {
        "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6,
        "kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10,
    }  # fmt: skip
    part.DType = enum.IntEnum("DType", dtypes)
    backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    part.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    part.get_cublasLt_version = lambda: 130000
    part.get_cudnn_version = lambda: 92000
    part.get_num_cublas_streams = lambda: 4
    vars(part).update(optimizer_kernels())
    return part
