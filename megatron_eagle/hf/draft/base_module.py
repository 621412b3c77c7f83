"""The architecture of a draft that is its base's own next-token module: the base says all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import pattern_of
from megatron_eagle.config.option import given, shown
from megatron_eagle.config.spec import DraftSpec
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.moe_args import moe_layers

COMPUTED: Mapping[str, object] = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "swiglu": True,
    "window_size": None,
}
"""Properties of a base's layers without which a draft's layer would compute something else."""

_CHOSEN = ("algorithm", "num_layers")


def beside_base(spec: DraftSpec, args: Mapping[str, Any]) -> DraftSpec:
    """Return ``spec`` with the layer of a base of these Megatron arguments, if its draft is the
    base's own module; any other ``spec`` as it is.

    Raises :class:`UserError` for an option that says otherwise, and for a base whose layers a draft
    cannot have.
    """
    if not spec.method.is_base_module:
        return spec
    name = spec.algorithm
    for field, value in COMPUTED.items():
        if args.get(field, value) != value:
            raise UserError(
                f"<algorithm> {name}: the base has {field} = {args[field]}, which no layer of a "
                f"draft has"
            )
    if spec.num_layers != 1:
        raise UserError(f"{shown('num_layers', spec.num_layers)}: an {name} draft is one layer")
    own = _layer_of(args)
    for field, value in given(spec).items():
        base_value = own.get(field, args.get(field))
        if field not in _CHOSEN and value != base_value:
            raise UserError(
                f"{shown(field, value)}: an {name} draft is a layer of the base's kind, which has "
                f"{'none' if base_value is None else base_value}"
            )
    return replace(spec, **own)


def _layer_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`DraftSpec` that describe a layer behind the base's last."""
    mla = bool(args.get("multi_latent_attention"))
    own: dict[str, Any] = {
        "attention": "mla" if mla else "gqa",
        "qk_layernorm": not mla and bool(args.get("qk_layernorm")),
    }
    experts = moe_layers(args)
    if pattern_of(args) is not None and any(experts) and not all(experts):
        raise UserError(
            f"<algorithm> mtp: some of the base's layers have experts and some have not "
            f"({pattern_of(args)}), and no field says which kind its module is"
        )
    if experts[-1]:
        own |= {
            name: args[name] for name in ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")
        }
    return own
