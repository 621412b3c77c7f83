"""EagleDraft: fc over the captured layers, transformer layers, final norm, vocab-parallel head."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.backend import LayerBackend
from megatron_eagle.attention.core import AttentionState
from megatron_eagle.compat import (
    ColumnParallelLinear,
    MegatronModule,
    build_module,
    copy_to_tensor_model_parallel_region,
    ensure_metadata_has_dp_cp_group,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    make_sharded_tensors_for_checkpoint,
    set_tensor_model_parallel_attributes,
)
from megatron_eagle.draft.layer import draft_layer_specs
from megatron_eagle.parallel.vocab import VocabShard


def draft_config(base_config: Any, num_layers: int) -> Any:
    """The base's TransformerConfig with the draft's depth: same hidden size, heads and (dense) ffn,
    and no experts, query/key norms or biases, which EAGLE-3 readers do not know.

    Of ``recompute_modules`` "core_attn" is done already: the kernels keep no scores for backward,
    and Megatron's own checkpointing cannot carry an attention state."""
    config = copy.copy(base_config)
    if config.recompute_granularity == "selective":
        config.recompute_modules = [m for m in config.recompute_modules if m != "core_attn"]
    config.num_layers = num_layers
    config.qk_layernorm = False
    config.add_qkv_bias = False
    config.add_bias_linear = False
    config.num_moe_experts = None
    config.moe_layer_freq = 1
    return config


class EagleDraft(MegatronModule):
    """An EAGLE-3 draft over one pipeline stage's tensor-parallel group.

    Args:
        config: TransformerConfig of the draft's layers.
        backend: what the layers are made of.
        num_aux: A, the number of captured base layers.
        vocab_ids: [D] int64, the base ids the draft predicts, ascending; ``shard`` is this rank's
            part of them.
        metadata: what a checkpoint says of the draft, see :mod:`megatron_eagle.draft.metadata`.
        pg_collection: process groups; ``tp`` shards the layers and the head, ``cp`` the sequence.

    The embedding is the base's and not part of the draft. Replicated over every other group.
    """

    def __init__(
        self,
        config: Any,
        backend: LayerBackend,
        num_aux: int,
        vocab_ids: Tensor,
        shard: VocabShard,
        metadata: Tensor,
        pg_collection: Any,
    ) -> None:
        super().__init__(config=config)
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.shard = shard
        self.num_aux = num_aux
        self.fc = FeatureProjection(config, num_aux * config.hidden_size, self.tp_group)
        self.layers = torch.nn.ModuleList(
            build_module(
                spec,
                config=config,
                layer_number=number,
                pg_collection=pg_collection,
                add_layer_offset=False,
            )
            for number, spec in enumerate(draft_layer_specs(backend, config), start=1)
        )
        self.norm = backend.norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.lm_head = VocabParallelHead(config, self.shard, self.tp_group)
        self.register_buffer("vocab_ids", vocab_ids, persistent=True)
        self.register_buffer("metadata", metadata, persistent=True)

    @property
    def shard_ids(self) -> Tensor:
        """[Dp] int64: the base ids of this rank's rows of the head."""
        return self.vocab_ids[self.shard.start : self.shard.start + self.shard.rows]

    def step(
        self, embedding: Tensor, hidden: Tensor, rotary: Tensor, state: AttentionState
    ) -> Tensor:
        """One TTT or decoding step: embedding and hidden [S, B, H] (this rank's part of S under
        sequence parallelism), rotary [S, 1 or B, 1, d] -> [S, B, H], before the final norm."""
        hidden = torch.cat([embedding, hidden], dim=-1)
        for layer in self.layers:
            hidden, _ = layer(hidden, attention_mask=state, rotary_pos_emb=rotary)
        return hidden

    def gather_rows(self, hidden: Tensor) -> Tensor:
        """[S', ...] to all rows [S, ...] on every TP rank, ready for the vocab-parallel head.

        Backward sums the ranks' partial gradients: a reduce-scatter under sequence parallelism
        (forward: an all-gather), else an all-reduce (forward: nothing).
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One draft whatever the layout; the head's padding rows may differ between layouts."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron takes a ModuleList for a plain module, all of it replicated over TP.
        layer: Any
        for index, layer in enumerate(self.layers):
            own = f"{prefix}layers.{index}."
            sharded = {key: value for key, value in sharded.items() if not key.startswith(own)}
            sharded |= layer.sharded_state_dict(own, sharded_offsets, metadata)
        sharded[f"{prefix}lm_head.weight"].allow_shape_mismatch = True
        return sharded


class VocabParallelHead(ColumnParallelLinear):
    """``lm_head``, whose product is the loss's: calling it gives its rows, not logits.

    It has to be called, never read: an overlapped parameter gather waits in a module's forward
    pre-hook for the bucket that holds its weight.
    """

    def __init__(self, config: Any, shard: VocabShard, tp_group: Any) -> None:
        super().__init__(
            config.hidden_size,
            shard.padded_rows * shard.world,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        self.rows = shard.rows

    def forward(self) -> Tensor:
        """[Dp, H]: this rank's rows that are real, padding sliced off. No collective."""
        return self.weight[: self.rows]


class FeatureProjection(MegatronModule):
    """``fc``: the captured layers [S, B, A * H] to the draft's hidden [S, B, H], no bias.

    Without sequence parallelism its rows are sharded over TP and the output is gathered (one
    all-gather, none in backward). With it, tokens are already sharded, so the weight is replicated,
    nothing is sent, and its gradient is summed over TP with the other sequence-parallel weights.
    The features must not need a gradient.
    """

    def __init__(self, config: Any, input_size: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.sharded = tp_group.size() > 1 and not config.sequence_parallel
        rows = config.hidden_size // tp_group.size() if self.sharded else config.hidden_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(rows, input_size, dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(self.weight, self.sharded, 0, 1)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        with get_cuda_rng_tracker().fork() if self.sharded else nullcontext():
            config.init_method(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        assert not features.requires_grad
        hidden = torch.nn.functional.linear(features, self.weight)
        if self.sharded:
            return gather_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return hidden

    def scale_blocks(self, scales: Tensor) -> None:
        """Multiply the columns of captured layer a by ``scales[a]``, in place."""
        with torch.no_grad():
            self.weight.view(self.weight.shape[0], scales.numel(), -1).mul_(scales.view(1, -1, 1))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0} if self.sharded else {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
