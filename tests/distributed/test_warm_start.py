"""A draft's files, put into the draft of any layout, give the reference's weights and losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME, parse_base
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.checkpoint import (
    StoredDraft,
    open_checkpoint_draft,
    write_draft_checkpoint,
)
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from tests.helpers.draft_fixture import Case, build_model, local_part, megatron_names
from tests.helpers.reference_case import MLA, make_case
from tests.helpers.reference_metadata import metadata_of
from tests.helpers.trained_draft import TrainedDraft
from tests.reference.eagle3 import ReferenceEagle3


def open_stored(directory: str, case: Case) -> StoredDraft:
    base = parse_base(metadata_of(case.config)["base"], "the test's base")
    if (Path(directory) / "config.json").exists():
        return open_hf_draft(directory, base)
    return open_checkpoint_draft(directory)


def loaded(rank: int, world: int, case: Case, directory: str) -> dict[str, torch.Tensor]:
    """This rank's parameters after a warm start from ``directory``."""
    megatron_parallel(tp=world)
    from megatron_eagle.training.warm_start import load_warm_start

    draft = build_model(case).draft
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(7.0)
    load_warm_start(draft, open_stored(directory, case))
    return dict(draft.named_parameters())


def resumed(rank: int, world: int, case: Case, directory: str) -> dict[str, torch.Tensor]:
    """This rank's parameters, loaded by Megatron from an imported checkpoint."""
    megatron_parallel(tp=world)
    from megatron.core import dist_checkpointing

    from megatron_eagle.checkpoint.directory import resolve_checkpoint

    model = build_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    state = dist_checkpointing.load(model.sharded_state_dict(), str(resolve_checkpoint(directory)))
    own = {key: value for key, value in state.items() if key.startswith("draft.")}
    model.load_state_dict(own, strict=True)
    return dict(model.draft.named_parameters())


def write_hf(case: Case, reference: ReferenceEagle3, directory: Path) -> None:
    """The files that a server reads, written without this package."""
    c = case.config
    tensors = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    if c.draft_vocab_size == c.vocab_size:
        tensors = {k: v for k, v in tensors.items() if k not in ("d2t", "t2d")}
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.draft_vocab_size,
        "num_hidden_layers": c.num_layers,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_eps,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 7]},
    }
    for flag in ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"):
        if getattr(c, flag):
            fields[flag] = True
    if c.kv_lora_rank:
        fields |= {
            "architectures": ["Eagle3DeepseekV2ForCausalLM"],
            "q_lora_rank": c.q_lora_rank or None,
            "kv_lora_rank": c.kv_lora_rank,
            "qk_nope_head_dim": c.head_dim,
            "qk_rope_head_dim": c.qk_rope_head_dim,
            "v_head_dim": c.v_head_dim,
        }
    if c.eagle1:
        fields["architectures"] = ["EagleLlamaForCausalLM"]
        del fields["eagle_config"], tensors["lm_head.weight"]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors")


EAGLE31 = {"fc_norm": True, "norm_output": True}
EAGLE1 = {"eagle1": True, "num_aux": 1, "draft_vocab_size": 61, "num_layers": 2}
CASES = [
    pytest.param(1, {}, id="tp1"),
    pytest.param(2, {"num_layers": 3}, id="tp2-three-layers"),
    pytest.param(2, {"sequence_parallel": True, "num_layers": 2}, id="tp2-sp-two-layers"),
    pytest.param(2, {"draft_vocab_size": 61}, id="tp2-whole-vocabulary"),
    pytest.param(4, {"draft_vocab_size": 5}, id="tp4-empty-shard"),
    pytest.param(2, {**EAGLE31, "sequence_parallel": True}, id="tp2-sp-eagle3.1"),
    pytest.param(2, {"norm_before_fc": True}, id="tp2-norm-before-fc"),
    pytest.param(2, EAGLE1, id="tp2-eagle1-two-layers"),
    pytest.param(2, {**MLA, "sequence_parallel": True, "num_layers": 2}, id="tp2-sp-mla"),
    pytest.param(1, {**MLA, "q_lora_rank": 0}, id="tp1-mla-whole-queries", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_every_shard_is_filled_from_the_stored_draft(
    tmp_path: Path, world: int, changes: dict[str, Any]
) -> None:
    """From the files, from the checkpoint made of them, and by Megatron's own loader."""
    case, reference = make_case(**changes)
    write_hf(case, reference, tmp_path / "hf")
    stored = open_stored(str(tmp_path / "hf"), case)
    assert stored.vocab_ids.equal(case.vocab_ids)
    write_draft_checkpoint(stored, tmp_path / "ckpt")
    runs = [
        run_distributed(loaded, world, case, str(tmp_path / "hf")),
        run_distributed(loaded, world, case, str(tmp_path / "ckpt")),
        run_distributed(resumed, world, case, str(tmp_path / "ckpt")),
    ]
    for rank in range(world):
        for name, (sources, kind) in megatron_names(case).items():
            parts = [case.weights[source] for source in sources]
            expected = local_part(parts, kind, case, rank, world)
            for run in runs:
                found = run[rank][name]
                if kind == "vocab":
                    rows = found.shape[0]
                    expected = parts[0][rank * rows : (rank + 1) * rows]
                    assert not found[expected.shape[0] :].any(), "padding"
                    found = found[: expected.shape[0]]
                assert found.equal(expected), (name, rank)


def started_with_sizes(
    rank: int, world: int, folder: Path, sizes: tuple[int, ...]
) -> list[int | str | None]:
    """Return the draft vocabulary that a warm start takes over with each size given as a flag."""
    megatron_parallel()
    from megatron_eagle.config.flags import parse_eagle_flags
    from megatron_eagle.training.warm_start import adopt_warm_start

    flags = ["--eagle-base-checkpoint", f"{folder}/base", "--eagle-warm-start", f"{folder}/ckpt"]
    found: list[int | str | None] = []
    for size in sizes:
        given = [*flags, "--eagle-draft-vocab-size", str(size)]
        try:
            found.append(adopt_warm_start(parse_eagle_flags(given), given)[0].spec.draft_vocab_size)
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("rows", "stored"), [(19, 19), (53, None)])
def test_a_size_given_as_a_flag_must_be_the_drafts(
    tmp_path: Path, rows: int, stored: int | None
) -> None:
    """53 ids are the base's whole vocabulary: the draft stores no size, but the flag agrees."""
    draft = TrainedDraft.make(draft_vocab=rows, padded_vocab=56)
    draft.save(tmp_path / "ckpt")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / BASE_JSON_NAME).write_text(json.dumps(draft.metadata["base"]))
    ((taken, refusal),) = run_distributed(started_with_sizes, 1, tmp_path, (rows, 7))
    assert taken == stored
    assert f"draft_vocab_size 7: the draft of warm_start {tmp_path}/ckpt has {rows}" in refusal
