"""Building the base from what its checkpoint says, and loading its weights, in any TP layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from megatron_eagle.attention.backend import LayerBackend
from megatron_eagle.checkpoint_dir import BaseInfo, resolve_checkpoint
from megatron_eagle.compat import GPTModel, StrictHandling, TransformerConfig, dist_checkpointing


def base_config(info: BaseInfo, tensor_parallel: int) -> Any:
    """The base's fp32 TransformerConfig outside the trainer, which makes its own from flags."""
    import torch

    args = info.megatron_args
    same = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    )  # fmt: skip
    return TransformerConfig(
        **{name: args[name] for name in same},
        layernorm_epsilon=args["norm_epsilon"],
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build_base(config: Any, info: BaseInfo, backend: LayerBackend, pg_collection: Any) -> Any:
    """The base's GPTModel, without weights; the vocabulary padded as Megatron pads it."""
    args = info.megatron_args
    multiple = args["make_vocab_size_divisible_by"] * pg_collection.tp.size()
    return GPTModel(
        config=config,
        transformer_layer_spec=backend.base_layer_spec(config),
        vocab_size=-(-info.vocab_size // multiple) * multiple,
        max_sequence_length=args["max_position_embeddings"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        pg_collection=pg_collection,
    )


def load_base(gpt: Any, directory: str | Path) -> None:
    """Load the base's weights, strictly, at whatever layout ``gpt`` has. A collective of all ranks.

    Raises ``ValueError`` naming the directory when a weight is missing or of another shape.
    """
    where = f"--eagle-base-checkpoint {directory}"
    try:
        # Megatron calls "unexpected" what the model asks for and the checkpoint does not have.
        state, _, lacking = dist_checkpointing.load(
            gpt.sharded_state_dict(),
            str(resolve_checkpoint(directory)),
            strict=StrictHandling.RETURN_ALL,
        )
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{where}: cannot be loaded: {reason_of(error)}") from error
    weights = sorted(key for key in lacking if not key.endswith("_extra_state"))
    if weights:
        raise ValueError(f"{where}: lacks {weights[0]}")
    gpt.load_state_dict(state, strict=False)


def reason_of(error: BaseException) -> str:
    """One line on why a load failed: the first rank's own words, since torch's CheckpointException
    (no Exception) only lists the ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
