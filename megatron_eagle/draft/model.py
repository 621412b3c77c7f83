"""EagleDraft: fc, transformer layers, final norm, vocab-parallel head, of any EAGLE generation.

EAGLE-3: hidden = fc(captured layers), then layers on [embedding ; hidden] at every step.
EAGLE-1: hidden = the base's last, then layers on fc([embedding ; hidden]) at every step; no norms
around the layers, and the base's own output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.attention.mla import MLARotary
from megatron_eagle.compat import (
    ColumnParallelLinear,
    MegatronModule,
    build_module,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.features import (
    FeatureProjection,
    MaskHidden,
    NormWeight,
    norm_features,
)
from megatron_eagle.draft.layer import draft_layer_specs
from megatron_eagle.draft.layer_config import Rotary
from megatron_eagle.draft.mla import share_rotary
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.parallel.vocab import VocabShard


class EagleDraft(MegatronModule):
    """A draft over one pipeline stage's tensor-parallel group.

    Args:
        config: TransformerConfig of the draft's layers.
        backend: what the layers are made of.
        options: the algorithm and its norms; nothing else of it is read.
        num_aux: A, the number of captured base layers (EAGLE-3).
        vocab_ids: [D] int64, the base ids the draft predicts, ascending; ``shard`` is this rank's
            part of them.
        metadata: what a checkpoint says of the draft, see :mod:`megatron_eagle.draft.metadata`.
        pg_collection: process groups; ``tp`` shards the layers and the head, ``cp`` the sequence.
        base_head: gives the base's output rows [Vp, H] on this rank, which EAGLE-1 shares.
        rotary: its RoPE, see :mod:`megatron_eagle.draft.layer_config`.

    The embedding is the base's and not part of the draft. Replicated over every other group.
    """

    def __init__(
        self,
        config: Any,
        backend: LayerBackend,
        options: EagleConfig,
        num_aux: int,
        vocab_ids: Tensor,
        shard: VocabShard,
        metadata: Tensor,
        pg_collection: Any,
        base_head: Callable[[], Tensor],
        rotary: Rotary,
    ) -> None:
        super().__init__(config=config)
        self.rotary = rotary
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.shard = shard
        self.num_aux = num_aux
        self.is_eagle1 = options.algorithm == "eagle1"
        self.feeds_normed = options.algorithm == "eagle3.1"
        inputs = 2 if self.is_eagle1 else num_aux
        self.fc = FeatureProjection(config, inputs * config.hidden_size, self.tp_group)
        self.fc_norm = torch.nn.ModuleList()
        self.input_norm: NormWeight | None = None
        if options.algorithm == "eagle3.1":
            self.fc_norm.extend(NormWeight(config, config.hidden_size) for _ in range(num_aux))
        elif options.norm_before_fc:
            self.input_norm = NormWeight(config, num_aux * config.hidden_size)
        self.mask_token = options.mask_token
        if options.algorithm == "p-eagle":
            self.mask_hidden = MaskHidden(config, num_aux * config.hidden_size)
        self.layers = torch.nn.ModuleList(
            build_module(
                spec,
                config=config,
                layer_number=number,
                pg_collection=pg_collection,
                add_layer_offset=False,
            )
            for number, spec in enumerate(draft_layer_specs(backend, config, options), start=1)
        )
        self.mla_rotary: MLARotary | None = None
        if config.multi_latent_attention:
            self.mla_rotary = share_rotary(self.layers, rotary.factor)
        self.norm = (
            torch.nn.Identity()
            if self.is_eagle1
            else backend.norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        )
        self.lm_head = (
            SharedHead(config, base_head, shard)
            if self.is_eagle1
            else VocabParallelHead(config, shard, self.tp_group)
        )
        self.register_buffer("vocab_ids", vocab_ids, persistent=True)
        self.register_buffer("metadata", metadata, persistent=True)

    @property
    def shard_ids(self) -> Tensor:
        """[Dp] int64: the base ids of this rank's rows of the head."""
        return self.vocab_ids[self.shard.start : self.shard.start + self.shard.rows]

    def start(self, features: Tensor) -> Tensor:
        """What step 0 reads, [S', B, H]: of the captured layers [S', B, A * H], or for EAGLE-1 of
        the base's final hidden [S', B, H]. Collectives: those of fc."""
        if self.is_eagle1:
            return features
        modules = self.fc_norm if self.input_norm is None else [self.input_norm]
        if len(modules):
            weights = [module() for module in modules]
            features = norm_features(features, weights, self.config.layernorm_epsilon, self.fc)
        return self.fc(features)

    def masked_start(self) -> Tensor:
        """What P-EAGLE's later steps read instead of an earlier step's output, [1, 1, H].
        Collectives: those of fc; in backward one all-reduce of [A * H] where fc is sharded."""
        return self.fc(self.fc.summing_gradient(self.mask_hidden()).unsqueeze(0))

    def step(
        self, embedding: Tensor, hidden: Tensor, rotary: Tensor, state: AttentionState
    ) -> tuple[Tensor, Tensor]:
        """One TTT or decoding step: embedding and hidden [S, B, H] (this rank's part of S under
        sequence parallelism), rotary [S, 1 or B, 1, d] -> what the head reads and what the next
        step reads, [S, B, H] each."""
        hidden = torch.cat([embedding, hidden], dim=-1)
        if self.is_eagle1:
            hidden = self.fc(self.fc.summing_gradient(hidden))
        with self._at(rotary) as angles:
            for layer in self.layers:
                hidden, _ = layer(hidden, attention_mask=state, rotary_pos_emb=angles)
        normed = self.norm(hidden)
        return normed, normed if self.feeds_normed else hidden

    def _at(self, rotary: Tensor) -> AbstractContextManager[Tensor | None]:
        """Inside, the rows of the layers have these angles; gives what to hand to the layers."""
        shared = self.mla_rotary
        return nullcontext(rotary) if shared is None else shared.at(rotary)

    def start_evenly(self, layer_sizes: Callable[[], Tensor]) -> None:
        """Give all captured layers an equal say in a fresh ``fc``: late ones are ten times larger
        than early ones. ``layer_sizes()`` is the typical RMS of each, [A]; not called where there
        is nothing to do (EAGLE-1, a norm per layer)."""
        if self.is_eagle1 or len(self.fc_norm):
            return
        sizes = layer_sizes()
        if self.input_norm is not None:  # norms the layers together already
            sizes = sizes / sizes.square().mean().sqrt()
        self.fc.scale_blocks(sizes.reciprocal())

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
        if not self.is_eagle1:
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
        whole = self.rows == self.weight.shape[0]  # a slice's backward would copy the gradient
        return self.weight if whole else self.weight[: self.rows]


class SharedHead(MegatronModule):
    """EAGLE-1's head: the base's frozen output layer. It has no parameter of its own."""

    def __init__(self, config: Any, base_head: Callable[[], Tensor], shard: VocabShard) -> None:
        super().__init__(config=config)
        self.base_head, self.rows = base_head, shard.rows

    def forward(self) -> Tensor:
        """[Vp, H]: this rank's rows that are real, padding sliced off; no gradient."""
        return self.base_head().detach()[: self.rows]
