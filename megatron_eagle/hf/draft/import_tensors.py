"""The tensors of a Hugging Face draft: checked against the name table, and read as Megatron's.

Shapes: D draft vocabulary, V base vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.entry import DraftEntry, first
from megatron_eagle.hf.draft.files import DraftFiles
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.parse_config import HfDraft

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Tensors that a draft may bring and that are not read: the embedding is the base's, the buffer is
# computed.
NOT_READ = ("embed_tokens.weight", "rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq")


def read_vocabulary(files: DraftFiles, draft: HfDraft) -> tuple[Tensor | None, Tensor]:
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


def fmt_of(files: DraftFiles) -> Format:
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


def check_tensors(files: DraftFiles, entries: list[DraftEntry], info: DraftInfo) -> None:
    """Raise ``UserError`` unless the files hold exactly the draft's tensors."""
    expected = {part.name: part.sizes(info.dims) for entry in entries for part in entry.sources}
    if missing := sorted(set(expected) - set(files.shapes)):
        raise UserError(f"{files.path}: incomplete draft, {', '.join(missing[:3])} missing")
    extra = set(files.shapes) - set(expected) - {"d2t", "t2d"}
    if not info.stores_head:
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


def stored_draft(
    files: DraftFiles,
    entries: list[DraftEntry],
    info: DraftInfo,
    *,
    order: Tensor | None,
    vocab_ids: Tensor,
) -> StoredDraft:
    """Return the draft in ``files``, whose tensors :func:`check_tensors` has accepted and which are
    read when they are asked for; ``order`` and ``vocab_ids`` as :func:`read_vocabulary` gives
    them."""
    dtypes = {files.dtypes[part.name] for entry in entries for part in entry.sources}
    return StoredDraft(
        source=str(files.path),
        info=info,
        vocab_ids=vocab_ids,
        tensors={
            entry.megatron: partial(read_tensor, files, entry, info=info, order=order)
            for entry in entries
        },
        shapes={entry.megatron: entry.sizes(info.dims) for entry in entries},
        dtype=next(iter(dtypes)) if len(dtypes) == 1 else torch.float32,
    )


def read_tensor(
    files: DraftFiles, entry: DraftEntry, *, info: DraftInfo, order: Tensor | None
) -> Tensor:
    """Read the Megatron tensor of ``entry``, whose rows of the vocabulary are put in ``order``."""
    parts = [files.tensor(part.name) for part in entry.sources]
    for part, source in zip(parts, entry.sources, strict=True):
        if not part.isfinite().all():
            raise UserError(f"{files.path}: {source.name} holds NaN or infinite values")
        if entry.join is first and not part.equal(parts[0]):
            raise UserError(f"{files.path}: {entry.sources[0].name} and {source.name} differ")
    tensor = entry.join(parts, info.dims)
    return tensor if order is None or entry.shape[0] != "D" else tensor[order]
