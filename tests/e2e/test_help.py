"""--help shows Megatron's flags and ours, without a base, a GPU or torchrun."""

from __future__ import annotations

import subprocess
import sys

from megatron_eagle.config.eagle_config import OPTIONS
from megatron_eagle.config.option import flag_name
from tests.e2e.launch import ROOT


def test_help_lists_all_flags() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_eagle", "train", "--help"],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("usage: megatron-eagle train ")
    assert "--tensor-model-parallel-size" in result.stdout
    for name in OPTIONS:
        assert flag_name(name) in result.stdout
    assert "megatron.training.arguments" in result.stderr
    assert "torch._inductor" not in result.stderr  # a CPU does not wait for PyTorch's compiler
