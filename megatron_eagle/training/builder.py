"""Building the model: the base from its checkpoint, the draft beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor

from megatron_eagle.attention.core import with_eagle_attention
from megatron_eagle.checkpoint_dir import BaseInfo, resolve_checkpoint
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.backend import local_backend, transformer_engine_backend
from megatron_eagle.draft.metadata import encode_metadata
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.teacher.targets import draft_vocab_shard
from megatron_eagle.training.model import EagleGPTModel, FrozenBase


class ModelBuilder:
    """A Megatron ``model_provider``: builds :class:`EagleGPTModel` on this rank when called."""

    def __init__(self, options: EagleConfig, base: BaseInfo, vocab_ids: Tensor) -> None:
        self.options, self.base, self.vocab_ids = options, base, vocab_ids

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> EagleGPTModel:
        assert pre_process and post_process and vp_stage is None, "one pipeline stage"
        args = get_args()
        config = config or core_transformer_config_from_args(args)
        captured = self.options.captured_layers(config.num_layers)
        gpt = build_base(config, args, self.base.vocab_size, pg_collection)
        load_base(gpt, self.options.base_checkpoint)
        base = FrozenBase(gpt, captured, self.base.vocab_size)
        draft = self._build_draft(config, args, base, pg_collection)
        _scale_features(draft, base)
        print_rank_0(
            f"> draft: {sum(p.numel() for p in draft.parameters()):,} parameters per rank, "
            f"layers {' '.join(map(str, captured))} captured, "
            f"{self.vocab_ids.numel():,} of {self.base.vocab_size:,} token ids"
        )
        return EagleGPTModel(base, draft, self.options)

    def _build_draft(
        self, config: Any, args: Any, base: FrozenBase, pg_collection: Any
    ) -> EagleDraft:
        use_te = args.transformer_impl == "transformer_engine"
        backend = transformer_engine_backend() if use_te else local_backend()
        shard = draft_vocab_shard(
            self.vocab_ids.numel(),
            self.base.vocab_size,
            base.output_weight.shape[0],
            pg_collection.tp,
        )
        metadata = {
            "config": self.options.to_mapping(),
            "aux_layers": list(base.taps.layers),
            "ttt_steps": self.options.ttt_steps,
            "num_layers": self.options.num_layers,
            "draft_vocab_size": self.vocab_ids.numel(),
            "base": self.base.as_dict(),
        }
        return EagleDraft(
            draft_config(config, self.options.num_layers),
            backend,
            len(base.taps.layers),
            self.vocab_ids.to(base.output_weight.device),
            shard,
            encode_metadata(metadata).to(base.output_weight.device),
            pg_collection,
        )


def draft_config(base_config: Any, num_layers: int) -> Any:
    """The base's TransformerConfig with the draft's depth: same hidden size, heads and ffn, and no
    query/key norms or biases, which EAGLE-3 readers do not know."""
    config = copy.copy(base_config)
    config.num_layers = num_layers
    config.qk_layernorm = False
    config.add_qkv_bias = False
    config.add_bias_linear = False
    return config


def build_base(config: Any, args: Any, vocab_size: int, pg_collection: Any) -> GPTModel:
    """The base's GPTModel, without weights. ``vocab_size`` is padded as Megatron does."""
    if args.transformer_impl == "transformer_engine":
        spec = transformer_engine_backend().layer_spec(config)
    else:
        spec = with_eagle_attention(local_backend().layer_spec(config))
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=-(-vocab_size // multiple) * multiple,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        pg_collection=pg_collection,
    )


def load_base(gpt: GPTModel, directory: str | Path | None) -> None:
    """Load the base's weights, strictly, at whatever layout ``gpt`` has. A collective of all ranks.

    Raises ``ValueError`` naming the directory when a weight is missing or of another shape.
    """
    assert directory is not None
    path = resolve_checkpoint(directory)
    sharded = gpt.sharded_state_dict()
    print_rank_0(f"> loading the base from {directory}")
    try:
        state, missing, _ = dist_checkpointing.load(
            sharded, str(path), strict=StrictHandling.RETURN_ALL
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--eagle-base-checkpoint {directory}: cannot be loaded: {reason[0]}"
        ) from error
    lacking = sorted(key for key in missing if not key.endswith("_extra_state"))
    if lacking:
        raise ValueError(f"--eagle-base-checkpoint {directory}: lacks {lacking[0]}")
    gpt.load_state_dict(state, strict=False)


@torch.no_grad()
def _scale_features(draft: EagleDraft, base: FrozenBase, length: int = 128) -> None:
    """Scale each block of ``fc`` by its captured layer's typical size, so that all layers start
    with an equal say (late layers are ten times larger than early ones). Measured on random
    tokens, which need no data; medians, since first tokens carry massive activations."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.vocab_size, (1, length), generator=generator)
    features, _ = base(tokens.to(base.embedding_weight.device))
    blocks = features.float().unflatten(-1, (draft.num_aux, -1))
    typical = blocks.square().mean(-1).sqrt().flatten(0, 1).median(0).values
    if draft.config.sequence_parallel:
        torch.distributed.all_reduce(typical, group=draft.tp_group)
        typical /= draft.tp_group.size()
    draft.fc.scale_blocks(typical.reciprocal())
