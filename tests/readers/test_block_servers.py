"""What SGLang's own model files compute from an exported block draft: two blocks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.readers import sglang_block_reader, sglang_reader
from tests.readers.block_drafts import ANCHORS, BLOCK_DRAFTS, block_sample

WHEELS = Path(os.environ.get("READERS_WHEELS", "absent"))
TOLERANCE = 2e-4
if not (WHEELS / "sglang").is_dir():
    pytest.skip("run by `make test-readers`", allow_module_level=True)
sglang_reader.install(WHEELS)


@pytest.mark.parametrize("name", BLOCK_DRAFTS)
@pytest.mark.parametrize("fmt", ["hf", "sglang"])
def test_sglang_gives_the_draft_s_own_logits(name: str, fmt: str, tmp_path: Path) -> None:
    given = block_sample(tmp_path, name, fmt)
    if isinstance(given, str):
        pytest.skip(given)
    reader = sglang_block_reader.SglangBlockReader(given)
    for number, anchor in enumerate(ANCHORS):
        logits, confidence = reader.block(anchor)
        assert (logits - given.logits[number]).abs().max() < TOLERANCE
        expected = given.confidence[number]
        if expected is not None:
            assert confidence is not None
            assert (confidence - expected).abs().max() < TOLERANCE
