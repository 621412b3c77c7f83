"""Import: the Hugging Face draft of any project -> the tensors of a Megatron draft checkpoint.

Reading order: ``files.py`` (the files), ``parse_config.py`` (config.json), ``names.py`` (the name
table), and this file (the checks against the base, and the tensors). ``checkpoint.py`` writes the
result.

Shapes: D draft vocabulary, V base vocabulary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.algorithms import ALGORITHMS, Algorithm, Eagle1, Eagle3, Eagle31
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec, TrainOptions
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.config_json import draft_rope
from megatron_eagle.hf.draft.embedding import check_embedding
from megatron_eagle.hf.draft.files import DraftFiles
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import DraftEntry, draft_entries, first
from megatron_eagle.hf.draft.parse_config import HfDraft, parse_hf_draft, rope_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Tensors that a draft may bring and that are not read: the embedding is the base's, the buffer is
# computed.
NOT_READ = ("embed_tokens.weight", "rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq")


def open_hf_draft(
    directory: str | Path,
    base: BaseInfo,
    *,
    aux_layers: tuple[int, ...] | None = None,
    adapt: bool = False,
    base_directory: str | Path | None = None,
) -> StoredDraft:
    """Check the draft in ``directory`` against ``base``, from headers; read nothing large yet.

    Args:
        directory: config.json and the draft's tensors.
        base: the base that the draft is to be trained with.
        aux_layers: needed where config.json does not name them; must agree with it where it does.
        adapt: accept a draft whose rotary embedding, norm epsilon or token embedding is not the
            base's.
        base_directory: the base's checkpoint, to compare the embedding with; None skips that.

    Raises:
        UserError: with the file at fault.
    """
    files = DraftFiles.open(directory)
    source = str(files.path / "config.json")
    draft = parse_hf_draft(files.config, files.shapes, source)
    _check_base(draft, base, source=source, adapt=adapt)
    algorithm = _algorithm(draft, source)
    aux_layers = _aux_layers(draft, base, algorithm=algorithm, chosen=aux_layers, source=source)
    info = _info(draft, base, algorithm=algorithm, aux_layers=aux_layers, source=source)
    order, vocab_ids = _vocabulary(files, draft)
    entries = draft_entries(info, _fmt_of(files))
    _check_tensors(files, entries, info)
    if base_directory is not None and not adapt:
        check_embedding(files, base_directory)
    dtypes = {files.dtypes[part.name] for entry in entries for part in entry.sources}
    return StoredDraft(
        source=str(files.path),
        info=info,
        vocab_ids=vocab_ids,
        tensors={
            entry.megatron: partial(_join, files, entry, info=info, order=order)
            for entry in entries
        },
        shapes={entry.megatron: entry.sizes(info.dims) for entry in entries},
        dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32,
    )


def _check_base(draft: HfDraft, base: BaseInfo, *, source: str, adapt: bool) -> None:
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
    rope = rope_of({**longest, **own_rope}, f"base {base.name}")
    for name, value, expected in (
        ("rotary embedding", draft.rope, rope),
        ("rms_norm_eps", draft.norm_epsilon, args["norm_epsilon"]),
    ):
        if value != expected and not adapt:
            raise UserError(
                f"{source}: the draft's {name} {value} is not the base's {expected}, with which "
                "training would run it (<adapt> accepts that)"
            )


def _aux_layers(
    draft: HfDraft,
    base: BaseInfo,
    *,
    algorithm: Algorithm,
    chosen: tuple[int, ...] | None,
    source: str,
) -> tuple[int, ...]:
    """Return the aux layers of config.json, or else the ``chosen`` ones, or the default."""
    layers = base.megatron_args["num_layers"]
    if algorithm.reads_final_hidden:
        if chosen:
            raise UserError(
                f"{source}: an {algorithm.title} draft reads no aux layers, not {list(chosen)}"
            )
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


def _info(
    draft: HfDraft,
    base: BaseInfo,
    *,
    algorithm: Algorithm,
    aux_layers: tuple[int, ...],
    source: str,
) -> DraftInfo:
    compressed = draft.draft_vocab_size < base.vocab_size
    try:
        spec = DraftSpec(
            algorithm=algorithm.name,
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


def _algorithm(draft: HfDraft, source: str) -> Algorithm:
    if draft.eagle1:
        return ALGORITHMS[Eagle1.name]
    if draft.fc_norm and not draft.norm_output:
        raise UserError(f"{source}: fc_norm without norm_output (fed back) is not supported")
    if draft.norm_output and not draft.fc_norm:
        raise UserError(
            f"{source}: norm_output without fc_norm: for SpecForge it is the norm in front of the "
            "head, for others the state that is fed back; remove it if it is SpecForge's"
        )
    return ALGORITHMS[Eagle31.name if draft.fc_norm else Eagle3.name]


def _vocabulary(files: DraftFiles, draft: HfDraft) -> tuple[Tensor | None, Tensor]:
    """Return the order that sorts the rows of the head, and the ascending token ids, int64 [D].

    The order is None if the rows are sorted already.
    """
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
    """Compare ``t2d`` bool [V], if the files have it, with the ids that ``d2t`` names."""
    if "t2d" not in files.shapes:
        return
    expected = torch.zeros(vocab, dtype=torch.bool)
    expected[ids] = True
    t2d = files.tensor("t2d")
    if t2d.shape != (vocab,) or not t2d.bool().equal(expected):
        raise UserError(f"{files.path}: t2d and d2t name different token ids")


def _fmt_of(files: DraftFiles) -> Format:
    """Return a format with the names that these files use."""
    midlayer = any(name.startswith("midlayer.") for name in files.shapes)
    norms = ("input_layernorm", "hidden_norm")
    later_norms = tuple(name for name in norms if f"layers.1.{name}.weight" in files.shapes)
    return Format(
        "imported",
        servers=(),
        single_layer="midlayer." if midlayer else "layers.0.",
        later_norms=later_norms or ("input_layernorm",),
    )


def _check_tensors(files: DraftFiles, entries: list[DraftEntry], info: DraftInfo) -> None:
    """Raise ``UserError`` unless the files hold exactly the draft's tensors."""
    expected = {part.name: part.sizes(info.dims) for entry in entries for part in entry.sources}
    if missing := sorted(set(expected) - set(files.shapes)):
        raise UserError(f"{files.path}: incomplete draft, {', '.join(missing[:3])} missing")
    extra = set(files.shapes) - set(expected) - {"d2t", "t2d"}
    if info.spec.method.shares_base_head:
        extra -= {"lm_head.weight"}  # a copy of the base's
    if info.spec.method.zero_fc_bias:
        _check_bias(files)
        extra -= {"fc.bias"}
    if unknown := sorted(name for name in extra if not name.endswith(NOT_READ)):
        raise UserError(
            f"{files.path}: {', '.join(unknown[:3])} unknown in an {info.spec.algorithm} draft"
        )
    for name, shape in expected.items():
        if files.shapes[name] != shape:
            raise UserError(
                f"{files.path}: {name} has shape {list(files.shapes[name])}, "
                f"but config.json and the base imply {list(shape)}"
            )
        if files.dtypes[name] not in FLOATS:
            raise UserError(f"{files.path}: {name} has dtype {files.dtypes[name]}")


def _check_bias(files: DraftFiles) -> None:
    """Raise ``UserError`` if ``fc`` has a bias other than zeros.

    SGLang reads a bias in EAGLE-1 drafts, and the drafts of SafeAILab have one.
    """
    if "fc.bias" in files.shapes and files.tensor("fc.bias").any():
        raise UserError(f"{files.path}: fc.bias is not zero, and training has no bias there")


def _join(files: DraftFiles, entry: DraftEntry, *, info: DraftInfo, order: Tensor | None) -> Tensor:
    """Read the Megatron tensor of ``entry``, whose rows of the vocabulary are put in ``order``."""
    parts = [files.tensor(part.name) for part in entry.sources]
    for part, source in zip(parts, entry.sources, strict=True):
        if not part.isfinite().all():
            raise UserError(f"{files.path}: {source.name} holds NaN or infinite values")
        if entry.join is first and not part.equal(parts[0]):
            raise UserError(f"{files.path}: {entry.sources[0].name} and {source.name} differ")
    tensor = entry.join(parts, info.dims)
    return tensor if order is None or not entry.padded else tensor[order]
