"""What the servers' own model files compute from an exported draft: prefill and three steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.readers import sglang_reader, vllm_reader, vllm_stand_ins
from tests.readers.drafts import DRAFTS, LENGTH, STEPS, Sample, sample

WHEELS = Path(os.environ.get("READERS_WHEELS", "absent"))
TOLERANCE = 2e-4
if not (WHEELS / "vllm").is_dir():
    pytest.skip("run by `make test-readers`", allow_module_level=True)
vllm_stand_ins.install(WHEELS)
sglang_reader.install(WHEELS)
VLLM = [(name, fmt) for name in DRAFTS for fmt in ("hf", "vllm", "speculators")]
SGLANG = [(name, fmt) for name in DRAFTS for fmt in ("hf", "sglang")]


@torch.no_grad()
def serve(reader: Any, given: Sample) -> torch.Tensor:
    """[LENGTH + STEPS, V]: the prefill's rows, then one row a step."""
    positions = torch.arange(LENGTH)
    logits, hidden = reader.step(
        given.tokens[1 : LENGTH + 1], positions, reader.start(given.aux[:LENGTH])
    )
    rows, hidden = [logits], hidden[-1:]
    for step in range(STEPS):
        token = given.tokens[LENGTH + 1 + step].unsqueeze(0)
        logits, hidden = reader.step(token, torch.tensor([LENGTH + step]), hidden)
        rows.append(logits)
    return torch.cat(rows)


def check(reader_class: Any, tmp_path: Path, name: str, fmt: str) -> None:
    given = sample(tmp_path, name, fmt)
    if isinstance(given, str):
        pytest.skip(given)
    found = serve(reader_class(given.directory, given.embedding, given.base_head), given)
    outside = torch.ones(found.shape[1], dtype=torch.bool)
    outside[given.vocab_ids] = False
    assert found[:, outside].isneginf().all()
    # EAGLE-1 has no norm in front of the head: its logits reach thousands here.
    scale = given.logits.abs().max() if "eagle1" in name else 1.0
    assert (found[:, given.vocab_ids] - given.logits).abs().max() < TOLERANCE * scale


@pytest.mark.parametrize(("name", "fmt"), VLLM)
def test_vllm_gives_the_draft_s_own_logits(tmp_path: Path, name: str, fmt: str) -> None:
    check(vllm_reader.VllmReader, tmp_path, name, fmt)


@pytest.mark.parametrize(("name", "fmt"), SGLANG)
def test_sglang_gives_the_draft_s_own_logits(tmp_path: Path, name: str, fmt: str) -> None:
    if "eagle1" in name:
        pytest.skip("SGLang's EAGLE-1 file needs its layer boundaries")
    check(sglang_reader.SglangReader, tmp_path, name, fmt)


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
def test_the_comparison_can_fail(tmp_path: Path, reader: str) -> None:
    given = sample(tmp_path, "one-layer", "hf")
    assert isinstance(given, Sample)
    given.logits[-1, 3] += 1e-3
    read = {"vllm": vllm_reader.VllmReader, "sglang": sglang_reader.SglangReader}[reader]
    found = serve(read(given.directory, given.embedding, given.base_head), given)
    assert (found[:, given.vocab_ids] - given.logits).abs().max() > TOLERANCE
