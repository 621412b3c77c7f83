"""What the speculators library computes from an exported block draft, by its training forward."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.readers import library_readers
from tests.readers.block_drafts import ANCHORS, BLOCK_DRAFTS, LENGTH, BlockSample, block_sample

TOLERANCE = 2e-4
if importlib.util.find_spec("specforge") is None:
    pytest.skip("run by `make test-readers`", allow_module_level=True)
library_readers.install()


def load(given: BlockSample, kind: str) -> Any:
    path = given.directory / "config.json"
    content = json.loads(path.read_text())
    content["transformer_layer_config"]["attn_implementation"] = "eager"
    path.write_text(json.dumps(content))
    # Not the model's from_pretrained, which then looks the base up on the hub.
    configs: Any = importlib.import_module("speculators").SpeculatorModelConfig
    config = configs.from_pretrained(given.directory)
    module = importlib.import_module(f"speculators.models.{kind}.core")
    model = {"dflash": "DFlashDraftModel", "dspark": "DSparkDraftModel"}[kind]
    draft = getattr(module, model)(config)
    tensors = load_file(given.directory / "model.safetensors")
    missing, unexpected = draft.load_state_dict(tensors, strict=False)
    base = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert set(missing) <= base | {"lm_head.weight"} and not unexpected
    draft = draft.float().eval()
    draft.embed_tokens.weight.data = given.case.embedding
    if "lm_head.weight" in missing:
        draft.lm_head.weight.data = given.case.output_weight
    return module, draft


@pytest.mark.parametrize("name", BLOCK_DRAFTS)
def test_speculators_give_the_draft_s_own_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = block_sample(tmp_path, name, "speculators")
    if isinstance(given, str):
        pytest.skip(given)
    kind = "dspark" if given.case.config.next_token else "dflash"
    module, draft = load(given, kind)
    seen: list[tuple[Tensor, ...]] = []

    def keep(logits: Tensor, targets: Tensor, *rest: Any, **_: Any) -> tuple[Any, Any]:
        seen.append((logits, *rest))
        return torch.zeros(()), {}

    monkeypatch.setattr(module, "compute_metrics", keep)
    for number, anchor in enumerate(ANCHORS):
        mask = torch.zeros(1, LENGTH, dtype=torch.long)
        mask[0, anchor] = 1
        with torch.no_grad():
            draft(
                given.features[None], given.tokens[None], mask,
                torch.zeros(1, LENGTH, given.case.config.hidden_size),
                torch.zeros(1, LENGTH, dtype=torch.long), max_anchors=1,
            )  # fmt: skip
        logits, confidence, *_ = seen[-1]
        assert (logits[0] - given.logits[number]).abs().max() < TOLERANCE
        expected = given.confidence[number]
        if expected is not None:
            assert (confidence[0] - expected).abs().max() < TOLERANCE
