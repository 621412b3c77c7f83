"""What the servers' own model files compute from an exported block draft: two rounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.readers import sglang_block_reader, sglang_reader, vllm_block_reader, vllm_stand_ins
from tests.readers.block_drafts import ANCHORS, BLOCK_DRAFTS, BlockSample, block_sample

WHEELS = Path(os.environ.get("READERS_WHEELS", "absent"))
TOLERANCE = 2e-4
if not (WHEELS / "sglang").is_dir():
    pytest.skip("run by `make test-readers`", allow_module_level=True)
sglang_reader.install(WHEELS)
vllm_stand_ins.install(WHEELS)
VANILLA = [name for name in BLOCK_DRAFTS if name not in ("gated", "rnn")]


def check(
    given: BlockSample, number: int, logits: torch.Tensor, confidence: torch.Tensor | None
) -> None:
    """Compare with the oracle's block ``number``."""
    assert (logits - given.logits[number]).abs().max() < TOLERANCE
    expected = given.confidence[number]
    if expected is not None:
        assert confidence is not None
        assert (confidence - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", BLOCK_DRAFTS)
@pytest.mark.parametrize("fmt", ["hf", "sglang"])
def test_sglang_gives_the_draft_s_own_logits(name: str, fmt: str, tmp_path: Path) -> None:
    given = block_sample(tmp_path, name, fmt)
    if isinstance(given, str):
        pytest.skip(given)
    reader = sglang_block_reader.SglangBlockReader(given)
    for number, anchor in enumerate(ANCHORS):
        check(given, number, *reader.block(anchor))


@pytest.mark.parametrize("name", VANILLA)
@pytest.mark.parametrize("fmt", ["hf", "vllm", "speculators"])
def test_vllm_gives_the_draft_s_own_logits(name: str, fmt: str, tmp_path: Path) -> None:
    given = block_sample(tmp_path, name, fmt)
    if isinstance(given, str):
        pytest.skip(given)
    reader = vllm_block_reader.VllmBlockReader(given)
    assert reader.said_ids().tolist() == given.case.vocab_ids.tolist()
    for number, anchor in enumerate(ANCHORS):
        logits, probability = reader.round(anchor)
        confidence = None if probability is None else probability.logit()
        assert (confidence is not None) == given.case.config.confidence
        check(given, number, logits, confidence)


@pytest.mark.parametrize(("name", "weight"), [("gated", "gate_up_proj"), ("rnn", "joint_proj")])
def test_vllm_refuses_the_heads_that_the_converter_refuses_for_it(
    name: str, weight: str, tmp_path: Path
) -> None:
    (tmp_path / "refused").mkdir()
    assert isinstance(block_sample(tmp_path / "refused", name, "vllm"), str)
    (tmp_path / "forced").mkdir()
    forced = block_sample(tmp_path / "forced", name, "speculators")
    assert isinstance(forced, BlockSample)
    with pytest.raises(ValueError, match=f"markov_head.{weight}"):
        vllm_block_reader.VllmBlockReader(forced)
