"""SpecForge and the speculators library: trainers whose whole models run on a CPU.

Both unroll query-aligned, so the logits of row LENGTH - 1 at steps 1 .. are those of a chain.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.readers.drafts import LENGTH, STEPS, Sample
from tests.readers.wheel_modules import WheelModules

# What speculators imports for serving and data, and the model does not use.
UNUSED = ("openai", "datasets", "hs_connectors", "aiohttp")


def install() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    for name in UNUSED:
        if importlib.util.find_spec(name) is None:
            WheelModules(Path(), name, (), {}).install()


def rows_of(logits: list[Tensor]) -> Tensor:
    """[K][S, D] -> the prefill's rows, then the last prompt row of each later step."""
    return torch.cat([logits[0][:LENGTH], *(step[LENGTH - 1 : LENGTH] for step in logits[1:])])


@torch.no_grad()
def specforge_logits(given: Sample) -> Tensor:
    """[LENGTH + STEPS, D] over the draft's vocabulary."""
    auto = importlib.import_module("specforge.modeling.auto")
    # Not by from_pretrained, under which transformers 5 leaves its rotary buffers empty.
    config = auto.AutoDraftModelConfig.from_file(str(given.directory / "config.json"))
    model = auto.AutoDraftModel.from_config(config)
    tensors = load_file(given.directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"embed_tokens.weight", "t2d", "d2t"} and not unexpected
    ids = torch.arange(model.draft_vocab_size) + model.d2t
    assert ids.equal(given.vocab_ids) and model.t2d.nonzero().flatten().equal(given.vocab_ids)
    model = model.float().eval()
    size = given.aux.shape[0]
    mask = model.prepare_decoder_attention_mask(
        torch.ones(1, size, dtype=torch.bool), given.aux[None], 1, size, 0
    )
    hidden = model.project_hidden_states(given.aux[None])
    cache: list[list[Tensor]] = [[], []]
    logits = []
    for step in range(STEPS + 1):
        tokens = given.tokens[step + 1 : step + 1 + size]
        hidden = model.backbone(
            input_embeds=given.embedding[tokens][None],
            hidden_states=hidden,
            cache_hidden=cache,
            attention_mask=mask,
            position_ids=torch.arange(size)[None],
        )
        logits.append(model.compute_logits(hidden)[0])
    return rows_of(logits)


@torch.no_grad()
def speculators_logits(given: Sample) -> Tensor:
    """[LENGTH + STEPS, D] over the draft's vocabulary, from the model's own training forward."""
    path = given.directory / "config.json"
    content = json.loads(path.read_text())
    content["transformer_layer_config"]["attn_implementation"] = "eager"
    path.write_text(json.dumps(content))
    # Not the model's from_pretrained, which then looks the base up on the hub.
    configs: Any = importlib.import_module("speculators").SpeculatorModelConfig
    config = configs.from_pretrained(given.directory)
    model = importlib.import_module("speculators.models.eagle3.core").Eagle3DraftModel(config)
    tensors = load_file(given.directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    base = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert set(missing) == base and not unexpected
    if model.d2t is not None:
        assert (torch.arange(model.draft_vocab_size) + model.d2t).equal(given.vocab_ids)
    model = model.float().eval()
    model.embed_tokens.weight.data = given.embedding
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    size = given.aux.shape[0]
    model(
        given.aux[None],
        given.tokens[None, 1 : size + 1],
        torch.zeros(1, size, dtype=torch.long),
        ttt_steps=STEPS + 1,
    )
    return rows_of(logits)
