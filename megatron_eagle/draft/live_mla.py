"""Let a multi-latent attention layer make queries of the live rows alone.

Queries and keys have projections of their own there, so the rows are cut down in front of those of
queries. Under sequence parallelism a rank's live rows are more or fewer than its share, so they are
shared out anew: where the rows are narrowest, at the query's latent.

Shape letters: S tokens, S' this rank's of them, B micro-batch, C input channels, r channels of the
query's latent, N rows that have queries, T tensor-parallel ranks under sequence parallelism
(otherwise 1), n heads of this rank, d and dv channels of a key and a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.live_rows import take_rows
from megatron_eagle.compat import apply_rotary_pos_emb, gather_from_sequence_parallel_region
from megatron_eagle.draft.mla import DraftMLASelfAttention


class LiveQueryMLA(DraftMLASelfAttention):
    """The draft's MLA; inside ``Narrowing.to`` some rows have no query."""

    query_rows: Tensor | None = None
    """[N] int64: the rows of all S * B that have queries; None: all have."""

    @property
    def splits_products(self) -> bool:
        """Whether queries can be made apart: no recomputation or rotary embedding is fused over
        them and the keys, and sequence parallelism has a latent to share out."""
        config: Any = self.config
        gathers = config.sequence_parallel and config.q_lora_rank is None
        return not (self.recompute_up_proj or config.apply_rope_fusion or gathers)

    @property
    def key_value_weights(self) -> int:
        """How many elements of this rank's matrices all rows meet."""
        modules = [self.linear_kv_down_proj, self.linear_kv_up_proj]
        config: Any = self.config
        if config.sequence_parallel:
            modules.append(self.linear_q_down_proj)
        return sum(module.weight.numel() for module in modules)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what Megatron does of hidden_states [S', B, C]: query, key [S, B, n, d], value [S,
        B, n, dv] and two latents that nobody reads; with ``query_rows``, query is [N, 1, n, d].

        Collectives: those of the projections; under sequence parallelism one more all-gather over
        TP, of the latents (backward: one reduce-scatter).
        """
        if self.query_rows is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        angles, factor = self.rotary_pos_emb(hidden_states.shape[0])
        batch = hidden_states.shape[1]
        of_rows = take_rows(angles.expand(-1, batch, -1, -1), self.query_rows)
        query = self._queries(hidden_states, self.query_rows)
        key, value = self._keys_and_values(hidden_states, angles, factor)
        return self._rotated(query, of_rows, factor), key, value, None, None

    def _queries(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the queries [N, 1, n, d], not rotated, of x [S', B, C]."""
        config: Any = self.config
        if config.q_lora_rank is None:
            made, _ = self.linear_q_proj(take_rows(x, rows))
        else:
            made, _ = self.linear_q_up_proj(self._query_latents(x, rows))
        return made.unflatten(-1, (-1, self.q_head_dim))

    def _query_latents(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return this rank's normed latents [N / T, 1, r] of x [S', B, C]."""
        config: Any = self.config
        if not config.sequence_parallel:
            latents, _ = self.linear_q_down_proj(take_rows(x, rows))
            return self.q_layernorm(latents)  # type: ignore[no-any-return]
        latents, _ = self.linear_q_down_proj(x)
        group = self.pg_collection.tp
        whole = gather_from_sequence_parallel_region(
            latents, tensor_parallel_output_grad=True, group=group
        )
        mine = rows.view(group.size(), -1)[group.rank()]
        return self.q_layernorm(take_rows(whole, mine))  # type: ignore[no-any-return]

    def _keys_and_values(self, x: Tensor, angles: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Return the rotated keys [S, B, n, d] and the values [S, B, n, dv] of x [S', B, C]."""
        config: Any = self.config
        both, _ = self.linear_kv_down_proj(x)
        latent, shared = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        if config.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared, group=self.pg_collection.tp)
        made, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        sizes = [config.qk_head_dim, config.v_head_dim]
        own, value = made.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        rotated = self._rotate(shared.unsqueeze(-2), angles, factor)
        return torch.cat([own, rotated.expand(-1, -1, own.shape[2], -1)], dim=-1), value

    def _rotated(self, query: Tensor, angles: Tensor, factor: float) -> Tensor:
        """Rotate the last channels of query [N, 1, n, d] by angles [N, 1, 1, channels]."""
        config: Any = self.config
        own, rest = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([own, self._rotate(rest, angles, factor)], dim=-1)

    def _rotate(self, x: Tensor, angles: Tensor, factor: float) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(
            x,
            angles,
            config=self.config,
            mscale=factor,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )
        return rotated
