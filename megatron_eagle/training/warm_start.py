"""A run's draft begins as another's (--eagle-warm-start) or as the base's last layers
(--eagle-init-from-base).

Of a warm start come the weights and the vocabulary map; the optimizer starts afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.compat import ShardedTensor, apply_factories, nested_values
from megatron_eagle.config import DraftSpec, EagleConfig
from megatron_eagle.config.flags import given_options
from megatron_eagle.config.option import names
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.base_module import beside_base
from megatron_eagle.hf.draft.checkpoint import StoredDraft, open_checkpoint_draft
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from megatron_eagle.training.base_start import BaseStart, Tensors
from megatron_eagle.user_files import naming, reading


def adopt_warm_start(
    options: EagleConfig, argv: Sequence[str]
) -> tuple[EagleConfig, StoredDraft | None]:
    """Return the options with the architecture of the draft of --eagle-warm-start, and that draft;
    without the flag the options, with the base's layer for a next-token module, and None.

    Raises ``UserError`` for files that are not a draft of this base, and for a flag in ``argv``
    that contradicts them.
    """
    if options.train.warm_start is None:
        return _beside_base(options), None
    stored = _open(options, _base_info(options))
    if options.train.vocab_map is not None:
        raise UserError(
            f"<vocab_map> {options.train.vocab_map}: the draft of <warm_start> "
            f"{options.train.warm_start} brings its own"
        )
    spec = stored.info.spec
    args = stored.info.base.megatron_args
    stored_values = {
        **vars(spec),
        **layer_widths(spec, args),
        "draft_vocab_size": stored.info.draft_vocab_size,
    }
    for name in given_options(argv) & set(names(DraftSpec)):
        value = getattr(options.spec, name)
        if value != stored_values[name]:
            raise UserError(
                f"<{name}> {_words(value)}: the draft of <warm_start> "
                f"{options.train.warm_start} has {_words(stored_values[name])}"
            )
    return dataclasses.replace(options, spec=spec), stored


def _beside_base(options: EagleConfig) -> EagleConfig:
    """Return the options of a next-token module with its layer, which is the base's kind."""
    if not options.spec.method.is_base_module:
        return options
    base = _base_info(options)
    if base.is_native:
        raise UserError(
            f"<algorithm> {options.spec.algorithm}: next-token modules of bases that Megatron "
            "trained are not read; import the base's Hugging Face directory"
        )
    spec = beside_base(options.spec, base.megatron_args)
    return dataclasses.replace(options, spec=spec)


def load_warm_start(draft: EagleDraft, stored: StoredDraft) -> None:
    """Copy this rank's shards of ``stored`` into ``draft``, in any layout. No collective; memory:
    the largest whole tensor. Raises ``UserError`` for a tensor that cannot be read."""
    missing = _fill(draft, stored.tensors)
    assert not missing, sorted(missing)


def load_base_start(draft: EagleDraft, start: BaseStart, layer_sizes: Callable[[], Tensor]) -> None:
    """Copy this rank's shards of the base's last layers into ``draft``. ``layer_sizes()`` returns
    the typical RMS of each aux layer, [A]; called only where norms in front of fc took it out."""
    scale = 1.0
    if len(draft.fc_norm):
        scale = float(layer_sizes()[-1])
    elif draft.input_norm is not None:
        scale = float(layer_sizes().square().mean().sqrt())
    _fill(draft, start.tensors(draft.num_aux, scale, draft.config.init_method_std))


@torch.no_grad()
def _fill(draft: EagleDraft, tensors: Tensors) -> set[str]:
    """Copy this rank's shards of ``tensors``; return the keys of parameters not among them."""
    sharded = draft.sharded_state_dict(prefix="draft.")
    apply_factories(sharded)  # [gate ; up] becomes two tensors that share the parameter's memory
    shards: dict[str, list[Any]] = {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor):
            shards.setdefault(value.key, []).append(value)
    assert set(tensors) <= set(shards), sorted(set(tensors) - set(shards))
    for key, load in tensors.items():
        whole = load()
        for shard in shards[key]:
            leading = shard.prepend_axis_num  # of an expert, its number
            _copy(whole[shard.global_offset[:leading]], shard)
    return set(shards) - set(tensors) - {"draft.vocab_ids", "draft.metadata"}


def _copy(whole: Tensor, shard: Any) -> None:
    """Copy the part of ``whole``, without leading axes, at the shard's offset; rows past its end
    are padding, set to 0."""
    part = whole
    offsets = shard.global_offset[shard.prepend_axis_num :]
    for dim, (start, size) in enumerate(zip(offsets, shard.local_shape, strict=True)):
        rows = max(0, min(start + size, whole.shape[dim]) - start)
        part = part.narrow(dim, min(start, whole.shape[dim]), rows)
    shard.data[part.shape[0] :].zero_()
    shard.data[: part.shape[0]].copy_(part)


def _base_info(options: EagleConfig) -> BaseInfo:
    assert options.train.base_checkpoint is not None
    with naming("base_checkpoint"):
        return read_base(options.train.base_checkpoint, options.train.base_description)


def _open(options: EagleConfig, base: BaseInfo) -> StoredDraft:
    assert options.train.warm_start is not None
    directory = Path(options.train.warm_start)
    with naming("warm_start"), reading("warm_start", directory):
        if (directory / "config.json").is_file():
            return open_hf_draft(
                directory,
                base,
                aux_layers=options.spec.aux_layers,
                base_directory=options.train.base_checkpoint,
                parameter="warm_start",
            )
        stored = open_checkpoint_draft(directory)
        _check_base(stored, base)
        return stored


def _check_base(stored: StoredDraft, base: BaseInfo) -> None:
    """Another base of the same dimensions will do: that is what a warm start is for."""
    theirs = stored.info.base.megatron_args
    for name, value in base.megatron_args.items():
        if theirs.get(name) != value:
            raise UserError(
                f"<warm_start> {stored.source}: trained for a base with {name} = "
                f"{theirs.get(name)}, <base_checkpoint> has {value}"
            )


def _words(value: Any) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
