"""What a trained draft's checkpoint says of it, checked: the input of the conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo, parse_base
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.metadata import decode_metadata
from megatron_eagle.hf.base.megatron_args import dims_of
from megatron_eagle.hf.tables.entries import Dims, with_symbols

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
    """`aux_layers`: 0-based base layers whose OUTPUTS are captured, ascending; none for EAGLE-1."""

    aux_layers: tuple[int, ...]
    ttt_steps: int
    draft_vocab_size: int
    base: BaseInfo
    options: EagleConfig = field(default_factory=EagleConfig)

    @property
    def num_layers(self) -> int:
        """Layers of the draft."""
        return self.options.num_layers

    @property
    def compressed(self) -> bool:
        """Whether the draft has fewer tokens than the base."""
        return self.draft_vocab_size < self.base.vocab_size

    @property
    def layer_args(self) -> dict[str, Any]:
        """The base's Megatron arguments with the widths of the draft's layers."""
        args = self.base.megatron_args
        return {**args, **self.options.layer_widths(args)}

    @property
    def dims(self) -> Dims:
        """The symbols of `draft_names`."""
        dims = dims_of(self.layer_args)
        more = {
            "1": 1,
            "D": self.draft_vocab_size,
            "H2": 2 * dims["H"],
            "AH": len(self.aux_layers) * dims["H"],
            "QKV": dims["Q"] + 2 * dims["KV"],
            "F2": 2 * dims["F"],
        }
        return with_symbols(dims, more)


def parse_draft_info(tensor: Tensor, source: str) -> DraftInfo:
    """DraftInfo from the checkpoint's metadata tensor.

    Raises ValueError starting with `source` for another format, a missing or impossible field, and
    an option this release does not know, since it might change what the weights mean.
    """
    content = decode_metadata(tensor, source)
    base = parse_base(content.get("base"), f"{source}: base")
    _check_base(base, f"{source}: base")
    options = _options(content, source)
    info = DraftInfo(
        aux_layers=_aux_layers(content, options, base.megatron_args["num_layers"], source),
        ttt_steps=_positive(content, "ttt_steps", source),
        draft_vocab_size=_positive(content, "draft_vocab_size", source),
        base=base,
        options=options,
    )
    if info.draft_vocab_size > base.vocab_size:
        raise ValueError(
            f"{source}: draft_vocab_size {info.draft_vocab_size} exceeds the base's vocabulary "
            f"of {base.vocab_size}"
        )
    return info


def _options(content: dict[str, Any], source: str) -> EagleConfig:
    config = content.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{source}: config is missing")
    try:
        return EagleConfig.from_mapping(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def _check_base(base: BaseInfo, source: str) -> None:
    for name in BASE_SIZES:
        _positive(base.megatron_args, name, source)
    _positive(base.hf_config, "max_position_embeddings", source)
    for name in ("norm_epsilon", "rotary_base"):
        value = base.megatron_args.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{source}: {name} must be a positive number, found {value!r}")


def _positive(values: dict[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{source}: {key} must be a positive integer, found {value!r}")
    return value


def _aux_layers(
    content: dict[str, Any], options: EagleConfig, base_layers: int, source: str
) -> tuple[int, ...]:
    ids = content.get("aux_layers")
    if options.algorithm == "eagle1" and ids == []:
        return ()
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"{source}: aux_layers must be a list of layer numbers, found {ids!r}")
    if ids != sorted(set(ids)) or min(ids) < 0 or max(ids) >= base_layers:
        raise ValueError(
            f"{source}: aux_layers {ids} must ascend and lie in the base's {base_layers} layers"
        )
    return tuple(ids)
