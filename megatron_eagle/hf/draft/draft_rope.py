"""The rope fields in the config.json of a draft, which follow from its base."""

from __future__ import annotations

from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.hf.tables.rope import both_spellings, rope_fields


def draft_rope(base: BaseInfo, mla: bool) -> dict[str, Any]:
    """Return the rope fields of a draft of ``base``, in both spellings.

    ``mla``: whether the draft has multi-latent attention. A grouped-query draft beside an MLA base
    has plain rope (see ``draft.layer_config``).
    """
    plain = base.megatron_args.get("multi_latent_attention") and not mla
    fields = {} if plain else rope_fields(base.hf_config, f"base {base.name}")
    return both_spellings(fields, float(base.megatron_args["rotary_base"]))
