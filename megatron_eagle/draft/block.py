"""BlockDraft: a draft of blocks (DFlash, DSpark), which reads the base's hidden states as context.

The aux hidden states before a block's anchor become one tensor c by fc and a norm. Every layer
projects its context keys and values from c with its own weights; the block's rows are queries, and
keys and values beside these. So a layer's linear_qkv is used twice: whole on the block's rows, and
its key and value rows on c, which takes neither the layer's norm nor its MLP.

Shape letters: S' this rank's tokens, S the tokens of this context-parallel rank, Q sequences, N
blocks of B rows, H hidden, A aux layers, g key/value heads of this TP rank, d channels of a head, r
rank of the Markov head, Dp this rank's shard of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.core import AttentionState
from megatron_eagle.compat import apply_rotary_pos_emb
from megatron_eagle.draft.features import FeatureProjection
from megatron_eagle.draft.head import SharedHead, VocabParallelHead
from megatron_eagle.draft.markov import MarkovHead, Projection
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.parallel.products import linear


class BlockDraft(EagleDraft):
    """A draft of blocks; arguments are ``EagleDraft``'s.

    Its head is the base's: the whole output layer, or a frozen copy of the rows of its own ids,
    which :meth:`copy_head` fills.
    """

    markov: MarkovHead | None
    confidence: Projection | None

    def _build_inputs(self, backend: LayerBackend) -> None:
        config = self.config
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.fc = FeatureProjection(config, self.num_aux * size, self.tp_group)
        self.fc_norm = torch.nn.ModuleList()
        self.input_norm = None
        self.hidden_norm = backend.norm(config=config, hidden_size=size, eps=eps)

    def _layer_specs(self, backend: LayerBackend) -> list[Any]:
        return [backend.layer_spec(self.config) for _ in range(self.config.num_layers)]

    def _build_head(self, backend: LayerBackend, base_head: Callable[[], Tensor]) -> None:
        config, shard = self.config, self.shard
        self.norm = backend.norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        if self.spec.draft_vocab_size is None:
            self.lm_head = SharedHead(config, base_head, shard)
        else:
            self.lm_head = VocabParallelHead(config, shard, self.tp_group)
            self.lm_head.requires_grad_(False)
        self.markov = self.confidence = None
        if self.spec.markov is not None:
            kind, rank = self.spec.markov
            rows = base_head().shape[0]
            self.markov = MarkovHead(config, kind, rank, rows, shard, self.tp_group)
            if self.spec.confidence_head:
                self.confidence = Projection(config, 1, config.hidden_size + rank)

    @torch.no_grad()
    def copy_head(self, rows: Tensor) -> None:
        """Fill the frozen head with ``rows`` [Dp, H], the base's of this rank's ids; nothing to do
        where the draft has the base's whole head."""
        if isinstance(self.lm_head, VocabParallelHead):
            self.lm_head.weight[: rows.shape[0]] = rows
            self.lm_head.weight[rows.shape[0] :] = 0

    def context(self, features: Tensor) -> Tensor:
        """Return c [S, Q, H] on every TP rank, from the features [S', Q, A * H].

        Collectives: fc's; under sequence parallelism one all-gather (backward: one reduce-scatter),
        else in backward one all-reduce.
        """
        return self.gather_rows(self.hidden_norm(self.project(features)))

    def context_key_value(self, layer: int, c: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [Q, g, S, d] of c [S, Q, H] in ``layer`` (from 1 on), rotated
        by ``angles`` [S, 1 or Q, 1, d]. No collective; a gradient of c is this TP rank's part.

        Call it inside the layer's forward: only there are its weights sure to have arrived.
        """
        attention: Any = self.layers[layer - 1].self_attention
        groups = attention.num_query_groups_per_partition
        weight = attention.linear_qkv.weight.unflatten(
            0, (groups, -1, attention.hidden_size_per_attention_head)
        )
        both = linear(c, weight[:, -2:].flatten(0, 2)).unflatten(-1, (groups, 2, -1))
        key, value = both.unbind(3)  # [S, Q, g, d]
        key = apply_rotary_pos_emb(
            attention.k_layernorm(key),
            angles,
            config=self.config,
            mscale=attention._yarn_concentration_factor,
            cp_group=self.cp_group,
        )
        return key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)

    def run_blocks(self, rows: Tensor, angles: Tensor, state: AttentionState) -> Tensor:
        """Run the layers and the final norm on the rows of all blocks, [N * B, 1, H] (this rank's
        part under sequence parallelism), with angles [N * B, 1, 1, d]. Collectives: the layers'."""
        hidden = rows
        for layer in self.layers:
            hidden, _ = layer(hidden, attention_mask=state, rotary_pos_emb=angles)
        return self.norm(hidden)

    def joint_head(self) -> tuple[Tensor, Tensor | None]:
        """Return the head's rows beside the Markov head's W2, [Dp, H + r], without a gradient, and
        W2 [Dp, r] itself; the head's rows [Dp, H] and None without a Markov head."""
        head = self.lm_head().detach()
        if self.markov is None:
            return head, None
        columns = self.markov.output()
        return torch.cat([head, columns.detach()], dim=1), columns
