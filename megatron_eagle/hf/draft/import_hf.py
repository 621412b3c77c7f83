"""Somebody's Hugging Face draft -> the tensors of a Megatron draft checkpoint.

Reading order: `draft_files` (the files), `hf_draft` (config.json), `draft_names` (the name table),
and here the checks against the base and the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.algorithms import Eagle1, Eagle3, Eagle31
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec, TrainOptions
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.config_json import draft_rope
from megatron_eagle.hf.draft.embedding import check_embedding
from megatron_eagle.hf.draft.files import DraftFiles
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import DraftEntry, draft_entries, first
from megatron_eagle.hf.draft.parse_config import HfDraft, parse_hf_draft
from megatron_eagle.hf.tables.rope import comparable_rope

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# May be there and are not read: the embedding is the base's, the buffer is computed.
NOT_READ = ("embed_tokens.weight", "rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq")


@dataclass(frozen=True)
class StoredDraft:
    """A draft whose weights lie in files: `tensors` maps checkpoint keys (`draft.fc.weight`, ...)
    to readers of whole, unsharded, unpadded tensors of `shapes`. `vocab_ids` int64 [D] ascending.
    """

    source: str
    info: DraftInfo
    vocab_ids: Tensor
    tensors: Mapping[str, Callable[[], Tensor]]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype


def open_hf_draft(
    directory: str | Path,
    base: BaseInfo,
    *,
    aux_layers: tuple[int, ...] | None = None,
    adapt: bool = False,
    base_directory: str | Path | None = None,
) -> StoredDraft:
    """Check the draft in `directory` against `base`, from headers; nothing large is read yet.

    `aux_layers` must agree with the file, or say what the file does not. An embedding among the
    draft's tensors is compared with that of the base's checkpoint, if `base_directory` is given.
    With `adapt` the base's rotary embedding, norm epsilon and embedding may differ from the
    draft's. Raises ValueError with the file at fault.
    """
    files = DraftFiles.open(directory)
    source = str(files.path / "config.json")
    draft = parse_hf_draft(files.config, files.shapes, source)
    _check_base(draft, base, source, adapt)
    info = _info(draft, base, _aux_layers(draft, base, aux_layers, source), source)
    order, vocab_ids = _vocabulary(files, draft)
    entries = draft_entries(info, _format(files))
    _check_tensors(files, entries, info)
    if base_directory is not None and not adapt:
        check_embedding(files, base_directory)
    dtypes = {files.dtypes[part.name] for entry in entries for part in entry.sources}
    return StoredDraft(
        str(files.path),
        info,
        vocab_ids,
        {entry.megatron: partial(_join, files, entry, info, order) for entry in entries},
        {entry.megatron: entry.sizes(info.dims) for entry in entries},
        next(iter(dtypes)) if len(dtypes) == 1 else torch.float32,
    )


def _check_base(draft: HfDraft, base: BaseInfo, source: str, adapt: bool) -> None:
    args = base.megatron_args
    same = {
        "hidden_size": (draft.hidden_size, args["hidden_size"]),
        "target_hidden_size": (draft.target_hidden_size, args["hidden_size"]),
        "vocab_size": (draft.vocab_size, base.vocab_size),
    }
    for name, (found, expected) in same.items():
        if found != expected:
            raise UserError(f"{source}: {name} is {found}, the base {base.name} has {expected}")
    longest = {"max_position_embeddings": base.hf_config["max_position_embeddings"]}
    own_rope = draft_rope(base, draft.mla is not None)
    rope = comparable_rope({**longest, **own_rope}, f"base {base.name}")
    for what, own, expected in (
        ("rotary embedding", draft.rope, rope),
        ("rms_norm_eps", draft.norm_epsilon, args["norm_epsilon"]),
    ):
        if own != expected and not adapt:
            raise UserError(
                f"{source}: the draft's {what} {own} is not the base's {expected}, with which "
                "training would run it (<adapt> accepts that)"
            )


def _aux_layers(
    draft: HfDraft, base: BaseInfo, chosen: tuple[int, ...] | None, source: str
) -> tuple[int, ...]:
    layers = base.megatron_args["num_layers"]
    if draft.eagle1:
        if chosen:
            raise UserError(f"{source}: an EAGLE-1 draft reads no aux layers, not {list(chosen)}")
        return ()
    if draft.aux_layers is not None and chosen not in (None, draft.aux_layers):
        raise UserError(
            f"{source}: reads aux layers {list(draft.aux_layers)}, not {list(chosen or ())}"
        )
    aux_layers = draft.aux_layers or DraftSpec(aux_layers=chosen).aux_layers_of(layers)
    if aux_layers[-1] >= layers:
        raise UserError(
            f"{source}: reads aux layer {aux_layers[-1]}, the base {base.name} has {layers} layers"
        )
    return aux_layers


def _info(draft: HfDraft, base: BaseInfo, aux_layers: tuple[int, ...], source: str) -> DraftInfo:
    compressed = draft.draft_vocab_size < base.vocab_size
    try:
        spec = DraftSpec(
            algorithm=_algorithm(draft, source),
            attention="gqa" if draft.mla is None else "mla",
            aux_layers=aux_layers or None,
            num_layers=draft.num_layers,
            draft_vocab_size=draft.draft_vocab_size if compressed else None,
            norm_before_fc=draft.norm_before_fc,
            norm_before_residual=draft.norm_before_residual,
            **_widths(draft, base),
        )
        layer_widths(spec, base.megatron_args)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return DraftInfo(spec, base, TrainOptions().ttt_steps)


def _widths(draft: HfDraft, base: BaseInfo) -> dict[str, Any]:
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


def _algorithm(draft: HfDraft, source: str) -> str:
    if draft.eagle1:
        return Eagle1.name
    if draft.fc_norm and not draft.norm_output:
        raise UserError(f"{source}: fc_norm without norm_output (fed back) is not supported")
    if draft.norm_output and not draft.fc_norm:
        raise UserError(
            f"{source}: norm_output without fc_norm: for SpecForge it is the norm in front of the "
            "head, for others the state that is fed back; remove it if it is SpecForge's"
        )
    return Eagle31.name if draft.fc_norm else Eagle3.name


def _vocabulary(files: DraftFiles, draft: HfDraft) -> tuple[Tensor | None, Tensor]:
    """(the order that sorts the file's rows, or None if they are sorted; the ids, ascending)."""
    size, vocab = draft.draft_vocab_size, draft.vocab_size
    source = f"{files.path}: d2t"
    if "d2t" not in files.shapes:
        if size != vocab:
            raise UserError(f"{source} is missing: {size} of {vocab} ids, but not which")
        return None, torch.arange(vocab)
    offsets = files.tensor("d2t")
    if offsets.is_floating_point() or offsets.dtype == torch.bool or offsets.shape != (size,):
        raise UserError(
            f"{source} must hold {size} integers, found {offsets.dtype} {list(offsets.shape)}"
        )
    ids, order = (offsets.long() + torch.arange(size)).sort()
    check_vocab_ids(ids, vocab, source)
    _check_t2d(files, ids, vocab)
    return (None if order.equal(torch.arange(size)) else order), ids


def _check_t2d(files: DraftFiles, ids: Tensor, vocab: int) -> None:
    if "t2d" not in files.shapes:
        return
    expected = torch.zeros(vocab, dtype=torch.bool)
    expected[ids] = True
    found = files.tensor("t2d")
    if found.shape != (vocab,) or not found.bool().equal(expected):
        raise UserError(f"{files.path}: t2d and d2t name different token ids")


def _format(files: DraftFiles) -> Format:
    """The names in these files, whoever chose them."""
    middle = any(name.startswith("midlayer.") for name in files.shapes)
    present = ("input_layernorm", "hidden_norm")
    later = tuple(name for name in present if f"layers.1.{name}.weight" in files.shapes)
    return Format(
        "imported",
        (),
        single_layer="midlayer." if middle else "layers.0.",
        later_norms=later or ("input_layernorm",),
    )


def _check_tensors(files: DraftFiles, entries: list[DraftEntry], info: DraftInfo) -> None:
    expected = {part.name: part.sizes(info.dims) for entry in entries for part in entry.sources}
    if missing := sorted(set(expected) - set(files.shapes)):
        raise UserError(f"{files.path}: incomplete draft, {', '.join(missing[:3])} missing")
    others = set(files.shapes) - set(expected) - {"d2t", "t2d"}
    algorithm = info.spec.algorithm
    if info.spec.method.shares_base_head:
        others -= {"lm_head.weight"}  # the base's
        _check_bias(files)
        others -= {"fc.bias"}
    if unknown := sorted(name for name in others if not name.endswith(NOT_READ)):
        raise UserError(f"{files.path}: {', '.join(unknown[:3])} unknown in an {algorithm} draft")
    for name, shape in expected.items():
        if files.shapes[name] != shape:
            raise UserError(
                f"{files.path}: {name} has shape {list(files.shapes[name])}, "
                f"but config.json and the base imply {list(shape)}"
            )
        if files.dtypes[name] not in FLOATS:
            raise UserError(f"{files.path}: {name} has dtype {files.dtypes[name]}")


def _check_bias(files: DraftFiles) -> None:
    """SGLang wants a bias of fc in EAGLE-1 drafts, and SafeAILab's have one."""
    if "fc.bias" in files.shapes and files.tensor("fc.bias").any():
        raise UserError(f"{files.path}: fc.bias is not zero: drafts here have none")


def _join(files: DraftFiles, entry: DraftEntry, info: DraftInfo, order: Tensor | None) -> Tensor:
    parts = [files.tensor(part.name) for part in entry.sources]
    for part, source in zip(parts, entry.sources, strict=True):
        if not part.isfinite().all():
            raise UserError(f"{files.path}: {source.name} holds NaN or infinite values")
        if entry.join is first and not part.equal(parts[0]):
            raise UserError(f"{files.path}: {entry.sources[0].name} and {source.name} differ")
    whole = entry.join(parts, info.dims)
    return whole if order is None or not entry.padded else whole[order]
