"""The quickstart's real base: unpacked, imported, and equal to transformers on the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.e2e.launch import ROOT


def final_logits(rank: int, world: int, directory: str, tokens: Tensor) -> Tensor:
    """This rank's shard of the base's logits [B, S, Vp]."""
    groups = megatron_parallel(tp=world)
    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.teacher.base import FrozenBase
    from megatron_eagle.teacher.build import base_config, build_base, load_base

    info = load_base_json(directory)
    gpt = build_base(base_config(info, world), info, local_backend(), groups)
    load_base(gpt, directory)
    base = FrozenBase(gpt, (1,), info.vocab_size)
    final = base(tokens).final_hidden
    return (final @ base.output_weight.t()).detach().transpose(0, 1).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_imported_base_equals_transformers(ranks: int, quickstart_base: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    hf, base = quickstart_base
    torch.manual_seed(0)
    tokens = torch.randint(49152, (2, 40))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(tokens).logits
    shards = run_distributed(final_logits, ranks, str(base), tokens)
    found = torch.cat(shards, dim=-1)[..., : expected.shape[-1]]
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def quickstart_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quickstart")
    unpack = ROOT / "examples" / "quickstart" / "unpack_base.py"
    importer = ROOT / "tools" / "import_base.py"
    run = [sys.executable, str(unpack), "--output", str(folder / "hf")]
    subprocess.run(run, check=True, cwd=ROOT)
    run = [sys.executable, str(importer), "--hf", str(folder / "hf"), "--save"]
    subprocess.run([*run, str(folder / "base")], check=True, cwd=ROOT)
    return folder / "hf", folder / "base"
