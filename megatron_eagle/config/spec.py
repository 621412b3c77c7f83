"""DraftSpec: the architecture of a draft, which is what its checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_eagle.algorithms import ALGORITHMS, SPECIAL_OPTIONS, Algorithm
from megatron_eagle.config.option import check_ranges, check_types, given, option, shown
from megatron_eagle.errors import UserError

ATTENTIONS = ("gqa", "mla")
MOE_TOPK = 2
BLOCK_SIZE = 8
MARKOV_HEADS = ("vanilla", "gated", "rnn")
MARKOV_RANK = 256
GQA_WIDTHS = ("num_query_groups", "kv_channels")
MLA_WIDTHS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_MOE = ("moe_router_topk", "moe_ffn_hidden_size")


@dataclass(frozen=True)
class DraftSpec:
    """The architecture of a draft: everything that decides what its weights mean.

    A field of None takes the base's value. Raises :class:`UserError` on construction for a field
    that makes no sense by itself or that the algorithm does not have.
    """

    algorithm: str = option(
        "eagle3",
        "eagle1 (also EAGLE-2: reads the base's final hidden state, shares its output layer, "
        "regresses the hidden state), eagle3, eagle3.1 (a norm per aux layer, the normed output is "
        "fed back), p-eagle (all steps in one pass, later ones from a learned mask hidden state), "
        "dflash (a block of tokens in one pass), dspark (the same, with a Markov head) or mtp (the "
        "base's own next-token module, run step after step)",
        choices=tuple(ALGORITHMS),
    )
    aux_layers: tuple[int, ...] | None = option(
        None,
        "0-based base layers whose outputs the draft reads (auxiliary hidden states), ascending "
        "(default: 1, n//2 - 1 and n - 4 of n layers; for dflash and dspark five from 1 to n - 3)",
        type=int,
        nargs="+",
        metavar="LAYER",
    )
    draft_vocab_size: int | None = option(
        None,
        "D: size of the draft's vocabulary, its ids chosen by how often training supervises them "
        "(default: the base's whole vocabulary)",
        type=int,
        least=1,
    )
    num_layers: int = option(
        None,
        "transformer layers of the draft (default: 1; for dflash and dspark 5, as published ones)",
        type=int,
        least=1,
        most=1000,
    )
    norm_before_fc: bool = option(
        False, "EAGLE-3: one RMSNorm over the concatenated aux layers, in front of fc"
    )
    norm_before_residual: bool = option(
        False, "EAGLE-3: the first layer's residual is the normed hidden state, not the plain one"
    )
    qk_layernorm: bool = option(
        False,
        "EAGLE-3: an RMSNorm over each head's queries and keys, as Qwen3 has; of the servers, vLLM "
        "alone reads such drafts",
    )
    mask_token: int | None = option(
        None,
        "p-eagle, dflash, dspark: mask token id; choose a token that texts do not use",
        type=int,
        least=0,
    )
    block_size: int | None = option(
        None,
        "dflash, dspark: B, slots of a block, the anchor's included; dflash drafts B - 1 tokens, "
        f"dspark B (default: {BLOCK_SIZE})",
        type=int,
        least=2,
    )
    markov_head: str | None = option(
        None,
        "dspark: what the Markov head reads of the token before: vanilla (its embedding alone), "
        f"gated (by the hidden state) or rnn (a state along the block) (default: "
        f"{MARKOV_HEADS[0]})",
        choices=MARKOV_HEADS,
    )
    markov_rank: int | None = option(
        None, f"dspark: rank of the Markov head (default: {MARKOV_RANK})", type=int, least=1
    )
    confidence_head: bool = option(
        False, "dspark: learn how likely each slot's token is accepted, with a head of its own"
    )
    attention: str = option(
        "gqa",
        "gqa (grouped queries, which every server reads) or mla (multi-latent attention, for a "
        "base that has it: sizes and rotary embedding are the base's unless flags differ)",
        choices=ATTENTIONS,
    )
    ffn_hidden_size: int | None = option(
        None, "ffn width of the draft's layers (default: the base's)", type=int, least=1
    )
    num_attention_heads: int | None = option(
        None, "attention heads of the draft's layers (default: the base's)", type=int, least=1
    )
    num_query_groups: int | None = option(
        None, "key/value heads of the draft's layers (default: the base's)", type=int, least=1
    )
    kv_channels: int | None = option(
        None, "size of an attention head of the draft (default: the base's)", type=int, least=1
    )
    q_lora_rank: int | None = option(
        None,
        "MLA draft: rank of the queries, 0 for no low-rank projection (default: the base's)",
        type=int,
        least=0,
    )
    kv_lora_rank: int | None = option(
        None, "MLA draft: rank of keys and values (default: the base's)", type=int, least=1
    )
    qk_head_dim: int | None = option(
        None, "MLA draft: non-rotary channels of a head (default: the base's)", type=int, least=1
    )
    qk_pos_emb_head_dim: int | None = option(
        None, "MLA draft: rotary channels of a head (default: the base's)", type=int, least=1
    )
    v_head_dim: int | None = option(
        None, "MLA draft: channels of a head's values (default: the base's)", type=int, least=1
    )
    num_experts: int | None = option(
        None,
        "number of experts in each of the draft's layers (default: dense layers)",
        type=int,
        least=1,
    )
    moe_router_topk: int | None = option(
        None,
        f"experts that each token is sent to in a MoE draft (default: {MOE_TOPK})",
        type=int,
        least=1,
    )
    moe_ffn_hidden_size: int | None = option(
        None,
        "ffn width of a MoE draft's experts (default: that of a dense layer)",
        type=int,
        least=1,
    )

    def __post_init__(self) -> None:
        if self.aux_layers is not None:
            object.__setattr__(self, "aux_layers", tuple(int(i) for i in self.aux_layers))
        check_ranges(self)
        if self.num_layers is None:
            object.__setattr__(self, "num_layers", self.method.default_layers)
        check_algorithm_has(self.method, given(self))
        for name in sorted(self.method.required):
            if getattr(self, name) is None:
                raise UserError(f"<{name}>: <algorithm> {self.algorithm} needs it")
        _check_aux_layers(self.aux_layers)
        _check_attention(self)
        _check_experts(self)

    @property
    def method(self) -> Algorithm:
        """The algorithm as an object."""
        return ALGORITHMS[self.algorithm]

    @property
    def uses_mla(self) -> bool:
        """Whether the draft's layers have multi-latent attention."""
        return self.attention == "mla"

    def aux_layers_of(self, base_layers: int) -> tuple[int, ...]:
        """Return the aux layers beside a base of ``base_layers`` layers: 0-based, ascending; none
        for an algorithm that reads the final hidden state."""
        if self.method.reads_final_hidden:
            return ()
        if self.aux_layers is not None:
            return self.aux_layers
        layers = self.method.default_aux_layers(base_layers)
        if not layers:
            raise UserError(
                f"<aux_layers> must be given for a base of {base_layers} layers: "
                f"the defaults {self.method.aux_formula}"
            )
        return layers

    @property
    def norms_heads(self) -> bool:
        """Whether the draft norms each head's queries and keys: by option, block drafts always."""
        return self.qk_layernorm or self.method.drafts_blocks

    @property
    def slots(self) -> int:
        """B, the slots of a block draft's block."""
        return self.block_size or BLOCK_SIZE

    @property
    def block_drafts(self) -> int:
        """How many tokens a block draft drafts in one pass: all slots, or all but the anchor's."""
        return self.slots if self.method.slot_zero_predicts else self.slots - 1

    @property
    def markov(self) -> tuple[str, int] | None:
        """Kind and rank of the Markov head; None without one."""
        if "markov_head" not in self.method.options:
            return None
        return self.markov_head or MARKOV_HEADS[0], self.markov_rank or MARKOV_RANK

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DraftSpec:
        """Build from decoded JSON; raises :class:`UserError` for an unknown field or a type that a
        field does not have."""
        check_types(cls, values)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return all fields as JSON-serialisable values."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check_algorithm_has(algorithm: Algorithm, options: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for the first of ``options`` that ``algorithm`` does not have."""
    for name, value in options.items():
        if name in SPECIAL_OPTIONS and name not in algorithm.options:
            others = [a.name for a in ALGORITHMS.values() if name in a.options]
            reason = algorithm.reasons.get(name, f"has none; {' and '.join(others)} have")
            raise UserError(f"{shown(name, value)}: <algorithm> {algorithm.name} {reason}")


def _check_aux_layers(layers: tuple[int, ...] | None) -> None:
    if layers is None:
        return
    words = " ".join(map(str, layers))
    if not layers:
        raise UserError("<aux_layers> needs at least one layer")
    if min(layers) < 0:
        raise UserError(f"<aux_layers> must not be negative: {words}")
    if len(set(layers)) != len(layers):
        raise UserError(f"<aux_layers> names a layer twice: {words}")
    if list(layers) != sorted(layers):
        raise UserError(f"<aux_layers> must ascend: {words}")


def _check_attention(spec: DraftSpec) -> None:
    for name in GQA_WIDTHS if spec.uses_mla else MLA_WIDTHS:
        if getattr(spec, name) is not None:
            raise UserError(
                f"{shown(name, getattr(spec, name))}: a draft of <attention> {spec.attention} has "
                "no such width"
            )
    if spec.uses_mla and spec.qk_layernorm:
        raise UserError("<qk_layernorm>: a draft of <attention> mla has norms of its own")
    for name in ("kv_channels", "qk_pos_emb_head_dim"):
        if (getattr(spec, name) or 0) % 2:
            raise UserError(f"{shown(name, getattr(spec, name))} is odd: RoPE turns pairs")


def _check_experts(spec: DraftSpec) -> None:
    if spec.num_experts is None:
        for name in _MOE:
            if getattr(spec, name) is not None:
                raise UserError(
                    f"{shown(name, getattr(spec, name))}: only a MoE draft has it (<num_experts>)"
                )
    elif (spec.moe_router_topk or MOE_TOPK) > spec.num_experts:
        raise UserError(
            f"<moe_router_topk>: {spec.moe_router_topk or MOE_TOPK} experts of a token, but "
            f"<num_experts> {spec.num_experts}"
        )
