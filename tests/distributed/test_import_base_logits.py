"""An imported base computes the Hugging Face model's logits in every TP and PP layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint_dir import load_base_json, resolve_checkpoint
from megatron_eagle.hf.import_base import import_base
from tests.distributed.harness import megatron_parallel, run_distributed
from tests.tiny_hf import SIZES, logits_of, make_base

RELATIVE = 1e-4
LENGTH, BATCH = 16, 2
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
CASES = [
    (family, *layout) for family in ("llama", "mistral", "qwen2", "qwen3") for layout in LAYOUTS
]


@pytest.mark.parametrize(("family", "tp", "pp"), [*CASES, ("llama", 4, 1), ("qwen2", 2, 2)])
def test_logits_equal_hugging_face(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    model = make_base(tmp_path / "hf", family)
    import_base(tmp_path / "hf", tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=generator)
    expected = logits_of(model, tokens)
    padded = run_distributed(_logits, tp * pp, tp, pp, str(tmp_path / "base"), tokens)[-1]
    found = padded[..., : SIZES["vocab_size"]]
    assert padded.shape[-1] == 128 * tp
    assert not padded[..., SIZES["vocab_size"] :].any(), "rows of padding are zero"
    assert (found - expected).abs().max() < RELATIVE * expected.abs().max()


def _logits(rank: int, world_size: int, tp: int, pp: int, directory: str, tokens: Tensor) -> Any:
    """Logits [B, S, V] over all TP ranks, on the last pipeline stage."""
    groups = megatron_parallel(tp=tp, pp=pp)
    model = _gpt(load_base_json(directory).megatron_args, tp, pp, groups)
    _load(model, directory)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    first, last = groups.pp.rank() == 0, groups.pp.rank() == pp - 1
    if not first:
        hidden = torch.empty(LENGTH, BATCH, SIZES["hidden_size"])
        torch.distributed.recv(hidden, rank - tp)
        model.set_input_tensor(hidden)
    with torch.no_grad():
        output = model(tokens, positions, None)
    if not last:
        torch.distributed.send(output, rank + tp)
        return None
    shards = [torch.empty_like(output) for _ in range(tp)]
    torch.distributed.all_gather(shards, output.contiguous(), group=groups.tp)
    return torch.cat(shards, dim=-1)


def _gpt(args: dict[str, Any], tp: int, pp: int, groups: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    same = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels"
    same += " normalization add_bias_linear add_qkv_bias attention_dropout hidden_dropout"
    config = TransformerConfig(
        **{name: args[name] for name in (*same.split(), "qk_layernorm")},
        layernorm_epsilon=args["norm_epsilon"],
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    divisor = args["make_vocab_size_divisible_by"] * tp
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args["qk_layernorm"], normalization="RMSNorm"),
        -(-args["vocab_size"] // divisor) * divisor,
        args["max_position_embeddings"],
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == pp - 1,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        pg_collection=groups,
    )
    return model.eval()


def _load(model: Any, directory: str) -> None:
    """Fill `model`; every one of its tensors must be in the checkpoint, and no other may be."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict()},
        str(resolve_checkpoint(directory)),
        strict=dist_checkpointing.validation.StrictHandling.RAISE_ALL,
    )
    model.load_state_dict(state["model"])
