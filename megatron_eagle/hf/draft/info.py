"""DraftInfo: the description of a trained draft, parsed from its checkpoint and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.config import DraftSpec
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.draft.metadata import decode_metadata
from megatron_eagle.errors import UserError, message_of
from megatron_eagle.hf.base.megatron_args import dims_of
from megatron_eagle.hf.tables.entries import Dims, with_symbols

SPECULATORS_VERSION = "0.9.0"
"""Release of the speculators library whose format is written."""
BASE_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
)


@dataclass(frozen=True)
class DraftInfo:
    """Hold the description of a draft.

    Attributes:
        spec: its architecture; aux layers and widths are resolved.
        base: the base that it drafts for.
        ttt_steps: the number of TTT steps it was trained for.
        training: record of the options of its training.
    """

    spec: DraftSpec
    base: BaseInfo
    ttt_steps: int
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the aux layers, 0-based ids of outputs, ascending; none for EAGLE-1."""
        return self.spec.aux_layers or ()

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the draft."""
        return self.spec.num_layers

    @property
    def draft_vocab_size(self) -> int:
        """Return the size of the draft's vocabulary."""
        return self.spec.draft_vocab_size or self.base.vocab_size

    @property
    def compressed(self) -> bool:
        """Return whether the draft's vocabulary is smaller than the base's."""
        return self.draft_vocab_size < self.base.vocab_size

    @property
    def stores_head(self) -> bool:
        """Return whether the checkpoint holds a head, and not the base's whole one."""
        method = self.spec.method
        return self.compressed if method.drafts_blocks else not method.shares_base_head

    @property
    def has_names(self) -> bool:
        """Return whether there is a table of the draft's names: there is none of a draft with
        experts, unless it is its base's own module."""
        return self.spec.num_experts is None or self.spec.method.is_base_module

    @property
    def layer_args(self) -> dict[str, Any]:
        """Return the base's Megatron arguments with the widths of the draft's layers."""
        args = self.base.megatron_args
        return {**args, **layer_widths(self.spec, args)}

    @property
    def dims(self) -> Dims:
        """Return the sizes of the shape symbols in ``names.py``."""
        dims = dims_of(self.layer_args)
        more = {
            "D": self.draft_vocab_size,
            "H2": 2 * dims["H"],
            "AH": len(self.aux_layers) * dims["H"],
            "QKV": dims["Q"] + 2 * dims["KV"],
            "F2": 2 * dims["F"],
            "MR": self.spec.markov[1] if self.spec.markov else 0,
        }
        return with_symbols(dims, more)


def parse_draft_info(tensor: Tensor, source: str) -> DraftInfo:
    """Parse DraftInfo from the checkpoint's metadata tensor.

    Raises ``UserError`` starting with ``source`` for another format, a missing or impossible field,
    and a field this release does not know, since it might change what the weights mean.
    """
    content = decode_metadata(tensor, source)
    base = parse_base(content.get("base"), f"{source}: base")
    _check_base(base, f"{source}: base")
    training = content.get("training", {})
    info = DraftInfo(
        spec=_spec(content, source),
        base=base,
        ttt_steps=_positive(content, "ttt_steps", source),
        training=training if isinstance(training, dict) else {},
    )
    _check_aux_layers(info, source)
    if info.spec.method.drafts_blocks and info.ttt_steps != info.spec.block_drafts:
        raise UserError(
            f"{source}: ttt_steps {info.ttt_steps}, but a block of {info.spec.slots} slots drafts "
            f"{info.spec.block_drafts} tokens"
        )
    if info.draft_vocab_size > base.vocab_size:
        raise UserError(
            f"{source}: draft_vocab_size {info.draft_vocab_size} exceeds the base's vocabulary "
            f"of {base.vocab_size}"
        )
    return info


def _spec(content: dict[str, Any], source: str) -> DraftSpec:
    spec = content.get("spec")
    if not isinstance(spec, dict):
        raise UserError(f"{source}: spec is missing")
    try:
        return DraftSpec.from_mapping(spec)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {message_of(error)}") from error


def _check_aux_layers(info: DraftInfo, source: str) -> None:
    layers, base_layers = info.spec.aux_layers, info.base.megatron_args["num_layers"]
    if info.spec.method.reads_final_hidden:
        return
    if not layers:
        raise UserError(f"{source}: aux_layers must be a list of layer numbers, found {layers!r}")
    if max(layers) >= base_layers:
        raise UserError(
            f"{source}: aux_layers {list(layers)} must lie in the base's {base_layers} layers"
        )


def _check_base(base: BaseInfo, source: str) -> None:
    for name in BASE_SIZES:
        _positive(base.megatron_args, name, source)
    _positive(base.hf_config, "max_position_embeddings", source)
    for name in ("norm_epsilon", "rotary_base"):
        value = base.megatron_args.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{source}: {name} must be a positive number, found {value!r}")


def _positive(values: dict[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {key} must be a positive integer, found {value!r}")
    return value
