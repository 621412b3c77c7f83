"""Import of a block draft (DFlash, DSpark) of any project, as the start of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.config import DraftSpec
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.errors import UserError, message_of
from megatron_eagle.hf.draft.check_base import check_base, widths_of
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.embedding import ATOL, RTOL, check_embedding
from megatron_eagle.hf.draft.files import DraftFiles
from megatron_eagle.hf.draft.formats import FORMATS
from megatron_eagle.hf.draft.import_tensors import check_tensors, read_vocabulary, stored_draft
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import draft_entries
from megatron_eagle.hf.draft.parse_block import HfBlockDraft, parse_block_draft

MASK_FILE = "mask_embedding.pt"
_ROWS = 64


def open_block_draft(
    files: DraftFiles,
    base: BaseInfo,
    *,
    aux_layers: tuple[int, ...] | None = None,
    adapt: bool = False,
    base_directory: str | Path | None = None,
) -> StoredDraft:
    """Check the block draft in ``files`` against ``base``; arguments and errors are those of
    :func:`~megatron_eagle.hf.draft.import_hf.open_hf_draft`.

    Its embedding and head are the base's: copies in the files are compared with these.
    """
    source = str(files.path / "config.json")
    parsed = parse_block_draft(files.config, source)
    check_base(parsed.draft, base, source=source, adapt=adapt)
    info = _info(parsed, base, aux_layers, source)
    if (files.path / MASK_FILE).exists() and not adapt:
        raise UserError(
            f"{files.path / MASK_FILE}: an embedding of its own for the mask token; training would "
            "use the base's (<adapt> accepts that)"
        )
    order, vocab_ids = read_vocabulary(files, parsed.draft)
    entries = draft_entries(info, FORMATS["vllm"])
    check_tensors(files, entries, info)
    if base_directory is not None and not adapt:
        check_embedding(files, base_directory)
        _check_head(files, base, base_directory, vocab_ids, order)
    return stored_draft(files, entries, info, order=order, vocab_ids=vocab_ids)


def _info(
    parsed: HfBlockDraft, base: BaseInfo, chosen: tuple[int, ...] | None, source: str
) -> DraftInfo:
    draft, layers = parsed.draft, base.megatron_args["num_layers"]
    named = parsed.aux_layers
    if named is not None and chosen not in (None, named):
        raise UserError(f"{source}: reads aux layers {list(named)}, not {list(chosen or ())}")
    heads: dict[str, Any] = {}
    if parsed.markov is not None:
        heads = dict(zip(("markov_head", "markov_rank"), parsed.markov, strict=True))
        heads["confidence_head"] = parsed.confidence_head
    compressed = draft.draft_vocab_size < base.vocab_size
    try:
        spec = DraftSpec(
            algorithm=parsed.algorithm,
            aux_layers=named or chosen,
            num_layers=draft.num_layers,
            draft_vocab_size=draft.draft_vocab_size if compressed else None,
            mask_token=parsed.mask_token,
            block_size=parsed.block_size,
            **heads,
            **widths_of(draft, base),
        )
        layer_widths(spec, base.megatron_args)
        spec = DraftSpec(**{**vars(spec), "aux_layers": spec.aux_layers_of(layers)})
    except UserError as error:
        raise UserError(f"{source}: {message_of(error)}") from None
    if (spec.aux_layers or (0,))[-1] >= layers:
        raise UserError(
            f"{source}: reads aux layer {(spec.aux_layers or (0,))[-1]}, the base {base.name} has "
            f"{layers} layers"
        )
    if parsed.mask_token >= base.vocab_size:
        raise UserError(
            f"{source}: mask_token_id {parsed.mask_token} is outside the base's 0 to "
            f"{base.vocab_size - 1}"
        )
    return DraftInfo(spec, base, spec.block_drafts)


def _check_head(
    files: DraftFiles,
    base: BaseInfo,
    base_directory: str | Path,
    vocab_ids: Tensor,
    order: Tensor | None,
) -> None:
    """Compare the first rows of the draft's head, if its files hold one, with the base's rows of
    these ids, which training uses."""
    name = "lm_head.weight"
    if name not in files.shapes:
        return
    tied = not base.megatron_args["untie_embeddings_and_output_weights"]
    key = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    ids = vocab_ids[:_ROWS]
    expected = CheckpointReader.open(base_directory).load_rows(key, ids.tolist()).float()
    rows = files.tensor(name)
    copy = (rows if order is None else rows[order])[: len(ids)].float()
    if copy.shape != expected.shape or not torch.allclose(copy, expected, RTOL, ATOL):
        raise UserError(
            f"{files.path}: {name} is not the base's, which training would use: the draft trained "
            "its own, or belongs to another base (<adapt> accepts that)"
        )
