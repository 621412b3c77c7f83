"""EagleDraft: fc, transformer layers, final norm, vocab-parallel head, of any algorithm.

The algorithm (megatron_eagle/algorithms) says which parts there are and in what order they run.
S' this rank's tokens, B micro-batch, H hidden, A aux layers, D and Dp draft vocabulary and this
rank's shard of it, Vp this rank's shard of the base's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.mla import MLARotary
from megatron_eagle.compat import (
    MegatronModule,
    build_module,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_eagle.config import DraftSpec
from megatron_eagle.draft.features import (
    FeatureProjection,
    MaskHidden,
    NormWeight,
    norm_features,
)
from megatron_eagle.draft.head import SharedHead, VocabParallelHead
from megatron_eagle.draft.layer import Narrowing, draft_layer_specs
from megatron_eagle.draft.layer_config import Rotary
from megatron_eagle.draft.mla import share_rotary
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.parallel.vocab import VocabShard

_EXTRA_STATE = "_extra_state"


class EagleDraft(MegatronModule):
    """A draft over one pipeline stage's tensor-parallel group. ``draft.build`` builds one.

    Args:
        config: TransformerConfig of the draft's layers.
        backend: what the layers are made of.
        spec: the architecture.
        num_aux: A, the number of aux layers.
        vocab_ids: [D] int64, the base ids the draft predicts, ascending; ``shard`` is this rank's
            part of them.
        metadata: what a checkpoint says of the draft, see :mod:`megatron_eagle.draft.metadata`.
        pg_collection: process groups; ``tp`` shards the layers and the head, ``cp`` the sequence.
        base_head: returns the base's output rows [Vp, H] on this rank, for a shared head.
        rotary: its RoPE, see :mod:`megatron_eagle.draft.layer_config`.

    The embedding is the base's and not part of the draft. Replicated over every other group.
    """

    def __init__(
        self,
        *,
        config: Any,
        backend: LayerBackend,
        spec: DraftSpec,
        num_aux: int,
        vocab_ids: Tensor,
        shard: VocabShard,
        metadata: Tensor,
        pg_collection: Any,
        base_head: Callable[[], Tensor],
        rotary: Rotary,
    ) -> None:
        super().__init__(config=config)
        self.spec, self.algorithm = spec, spec.method
        self.rotary = rotary
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.shard, self.num_aux = shard, num_aux
        self._build_inputs(backend)
        self.layers = torch.nn.ModuleList(
            build_module(
                layer,
                config=config,
                layer_number=number,
                pg_collection=pg_collection,
                add_layer_offset=False,
            )
            for number, layer in enumerate(self._layer_specs(backend), start=1)
        )
        self.narrowing = Narrowing(self.layers[-1], self.tp_group, config.sequence_parallel)
        self.mla_rotary: MLARotary | None = None
        if config.multi_latent_attention:
            self.mla_rotary = share_rotary(self.layers, rotary.factor)
        self._build_head(backend, base_head)
        self.register_buffer("vocab_ids", vocab_ids, persistent=True)
        self.register_buffer("metadata", metadata, persistent=True)

    def _build_head(self, backend: LayerBackend, base_head: Callable[[], Tensor]) -> None:
        """Build the final norm and the head."""
        config, shard = self.config, self.shard
        self.norm: torch.nn.Module
        self.lm_head: VocabParallelHead | SharedHead
        if self.algorithm.shares_base_head:
            self.norm = torch.nn.Identity()
            self.lm_head = SharedHead(config, base_head, shard)
        else:
            self.norm = backend.norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            self.lm_head = VocabParallelHead(config, shard, self.tp_group)

    def _layer_specs(self, backend: LayerBackend) -> list[Any]:
        """Return the specs of the layers."""
        return draft_layer_specs(backend, self.config, self.spec)

    def _build_inputs(self, backend: LayerBackend) -> None:
        """Build fc, the norms in front of it and the mask hidden state."""
        config, hidden = self.config, self.config.hidden_size
        blocks = 2 if self.algorithm.joins_by_fc else self.num_aux
        self.fc = FeatureProjection(config, blocks * hidden, self.tp_group)
        self.fc_norm = torch.nn.ModuleList()
        self.input_norm: NormWeight | None = None
        if self.algorithm.norms_each_aux_layer:
            self.fc_norm.extend(NormWeight(config, hidden) for _ in range(self.num_aux))
        elif self.spec.norm_before_fc:
            self.input_norm = NormWeight(config, self.num_aux * hidden)
        if self.algorithm.learns_mask_hidden:
            self.mask_hidden = MaskHidden(config, self.num_aux * hidden)

    @property
    def shard_ids(self) -> Tensor:
        """[Dp] int64: the base ids of this rank's rows of the head."""
        return self.vocab_ids[self.shard.start : self.shard.start + self.shard.rows]

    def start(self, features: Tensor) -> Tensor:
        """Return what step 0 reads, [S', B, H], of the features [S', B, A * H] (EAGLE-1: of the
        base's final hidden state [S', B, H]). Collectives: those of fc."""
        return self.algorithm.start(self, features)

    def project(self, features: Tensor) -> Tensor:
        """Norm, if there are norms, and fc: [S', B, A * H] -> [S', B, H]. Collectives: fc's."""
        modules = self.fc_norm if self.input_norm is None else [self.input_norm]
        if len(modules):
            weights = [module() for module in modules]
            features = norm_features(features, weights, self.config.layernorm_epsilon, self.fc)
        return self.fc(features)

    def masked_start(self) -> Tensor:
        """Return what P-EAGLE's later steps read instead of an earlier step's output, [1, 1, H].
        Collectives: fc's; in backward one all-reduce of [A * H] where fc is sharded."""
        return self.fc(self.fc.summing_gradient(self.mask_hidden()).unsqueeze(0))

    def concatenate(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Put both side by side: [S', B, H] each -> [S', B, 2H]. No collective."""
        return torch.cat([embedding, hidden], dim=-1)

    def join_by_fc(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Run fc on both side by side: [S', B, H] each -> [S', B, H]. Collectives: fc's."""
        return self.fc(self.fc.summing_gradient(self.concatenate(embedding, hidden)))

    def step(
        self,
        embedding: Tensor,
        hidden: Tensor,
        rotary: Tensor,
        state: AttentionState,
        narrow_to: LiveRows | None = None,
        query_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one TTT or decoding step.

        embedding and hidden [S, B, H] (this rank's part of S under sequence parallelism), rotary
        [S, 1 or B, 1, d] -> what the head reads and what the next step reads, [S, B, H] each. With
        ``narrow_to`` these are of the N live rows alone, [N, 1, H]; ``state`` must do the same.
        ``query_rows``: see :meth:`Narrowing.to`.
        """
        hidden = self.algorithm.layer_input(self, embedding, hidden)
        with self._at(rotary) as angles, self.narrowing.to(narrow_to, query_rows):
            of_last = self.narrowing.angles(angles, hidden.shape[1])
            for layer in self.layers:
                own = of_last if layer is self.layers[-1] else angles
                hidden, _ = layer(hidden, attention_mask=state, rotary_pos_emb=own)
        normed = self.norm(hidden)
        return normed, normed if self.algorithm.feeds_back_normed else hidden

    def _at(self, rotary: Tensor) -> AbstractContextManager[Tensor | None]:
        """Give the layers these angles inside; yields what to pass to each layer."""
        shared = self.mla_rotary
        return nullcontext(rotary) if shared is None else shared.at(rotary)

    def start_evenly(self, layer_sizes: Callable[[], Tensor]) -> None:
        """Scale a fresh fc so that all aux layers weigh equally: late ones are ten times larger.

        ``layer_sizes()`` returns the typical RMS of each, [A]; it is not called where nothing needs
        scaling (no aux layers, a norm per layer).
        """
        if self.algorithm.joins_by_fc or len(self.fc_norm):
            return
        sizes = layer_sizes()
        if self.input_norm is not None:  # norms the layers together already
            sizes = sizes / sizes.square().mean().sqrt()
        self.fc.scale_blocks(sizes.reciprocal())

    def gather_rows(self, hidden: Tensor) -> Tensor:
        """Gather [S', ...] to all rows [S, ...] on every TP rank, for the vocab-parallel head.

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
        """Return the draft's sharded tensors: the same in every layout but for head padding, and
        for layers of Megatron-Core and of Transformer Engine."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron takes a ModuleList for a plain module, all of it replicated over TP.
        layer: Any
        for index, layer in enumerate(self.layers):
            own = f"{prefix}layers.{index}."
            sharded = {key: value for key, value in sharded.items() if not key.startswith(own)}
            sharded |= layer.sharded_state_dict(own, sharded_offsets, metadata)
        if isinstance(self.lm_head, VocabParallelHead):
            sharded[f"{prefix}lm_head.weight"].allow_shape_mismatch = True
        for name in ("vocab_ids", "metadata"):  # a load in place would change what this draft is
            entry = sharded[f"{prefix}{name}"]
            entry.data = entry.data.clone()
        return without_extra_states(sharded)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the draft's tensors. Extra states are neither expected nor loaded.

        Raises ``RuntimeError`` naming tensors that are missing or too many, if ``strict``.
        """
        result = super().load_state_dict(
            without_extra_states(state_dict), strict=False, assign=assign
        )
        missing = [key for key in result.missing_keys if _EXTRA_STATE not in key]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing {missing}, unexpected {result.unexpected_keys}")
        return type(result)(missing, result.unexpected_keys)


def without_extra_states(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` without the states that linear layers and Transformer Engine's norms
    keep for FP8, which a draft never is: the two kinds of layers have different ones."""
    return {key: value for key, value in state_dict.items() if _EXTRA_STATE not in key}
