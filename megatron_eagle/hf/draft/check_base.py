"""A foreign draft beside its base: whether it belongs to it, and the widths of its layers."""

from __future__ import annotations

from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.draft_rope import draft_rope
from megatron_eagle.hf.draft.parse_config import HfDraft
from megatron_eagle.hf.tables.rope import comparable_rope


def check_base(draft: HfDraft, base: BaseInfo, *, source: str, adapt: bool) -> None:
    """Raise ``UserError`` unless ``draft`` is of the base's sizes and, without ``adapt``, has its
    rotary embedding and epsilon."""
    args = base.megatron_args
    sizes = {
        "hidden_size": (draft.hidden_size, args["hidden_size"]),
        "target_hidden_size": (draft.target_hidden_size, args["hidden_size"]),
        "vocab_size": (draft.vocab_size, base.vocab_size),
    }
    for name, (size, expected) in sizes.items():
        if size != expected:
            raise UserError(f"{source}: {name} is {size}, the base {base.name} has {expected}")
    longest = {"max_position_embeddings": base.hf_config["max_position_embeddings"]}
    own_rope = draft_rope(base, draft.mla is not None)
    rope = comparable_rope({**longest, **own_rope}, f"base {base.name}")
    for name, value, expected in (
        ("rotary embedding", draft.rope, rope),
        ("rms_norm_eps", draft.norm_epsilon, args["norm_epsilon"]),
    ):
        if value != expected and not adapt:
            raise UserError(
                f"{source}: the draft's {name} {value} is not the base's {expected}, with which "
                "training would run it (<adapt> accepts that)"
            )


def widths_of(draft: HfDraft, base: BaseInfo) -> dict[str, Any]:
    """Return the widths of the draft's layers, unless they are all the base's."""
    widths = {
        "ffn_hidden_size": draft.intermediate_size,
        "num_attention_heads": draft.num_heads,
        **(
            {"num_query_groups": draft.num_kv_heads, "kv_channels": draft.head_dim}
            if draft.mla is None
            else draft.mla
        ),
    }
    args = base.megatron_args
    same = all((args.get(name) or 0) == value for name, value in widths.items())
    return {} if same else widths
