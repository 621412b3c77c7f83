"""Import: the Hugging Face draft of any project -> the tensors of a Megatron draft checkpoint.

Reading order: ``files.py`` (the files), ``parse_config.py`` (config.json), ``names.py`` (the name
table), ``import_tensors.py`` (the tensors), and this file (the checks against the base, and the
draft's description). ``checkpoint.py`` writes the result.
"""

from __future__ import annotations

from pathlib import Path

from megatron_eagle.algorithms import ALGORITHMS, Algorithm, Eagle1, Eagle3, Eagle31
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec, TrainOptions
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.errors import UserError, message_of
from megatron_eagle.hf.draft.check_base import check_base, widths_of
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.embedding import check_embedding
from megatron_eagle.hf.draft.files import DraftFiles
from megatron_eagle.hf.draft.import_block import open_block_draft
from megatron_eagle.hf.draft.import_module import is_base_config, open_base_module
from megatron_eagle.hf.draft.import_tensors import (
    check_tensors,
    fmt_of,
    read_vocabulary,
    stored_draft,
)
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import draft_entries
from megatron_eagle.hf.draft.parse_block import is_block_config
from megatron_eagle.hf.draft.parse_config import HfDraft, parse_hf_draft
from megatron_eagle.hf.draft.servers import outputs_of_inner_ids
from megatron_eagle.hf.files.text_part import read_text_config
from megatron_eagle.user_files import reading


def open_hf_draft(
    directory: str | Path,
    base: BaseInfo,
    aux_layers: tuple[int, ...] | None = None,
    adapt: bool = False,
    *,
    base_directory: str | Path | None = None,
    parameter: str = "hf",
) -> StoredDraft:
    """Check the draft in ``directory`` against ``base``, from headers; read nothing large yet.

    Args:
        directory: config.json and the draft's tensors.
        base: the base that the draft is to be trained with.
        aux_layers: needed where config.json does not name them; must agree with it where it does.
        adapt: accept a draft whose rotary embedding, norm epsilon or token embedding is not the
            base's.
        base_directory: the base's checkpoint, to compare the embedding with; None skips that.
        parameter: that ``directory`` is the value of, for errors.

    Raises:
        UserError: with the file at fault.
    """
    with reading(parameter, directory):
        config = Path(directory) / "config.json"
        if config.is_file() and is_base_config(read_text_config(config)):
            _refuse_choices(config, aux_layers, adapt)
            return open_base_module(Path(directory), base, base_directory=base_directory)
        files = DraftFiles.open(directory)
        if is_block_config(files.config):
            return open_block_draft(
                files, base, aux_layers=aux_layers, adapt=adapt, base_directory=base_directory
            )
        return _open(
            files,
            base,
            chosen=aux_layers,
            adapt=adapt,
            base_directory=base_directory,
        )


def _refuse_choices(config: Path, aux_layers: tuple[int, ...] | None, adapt: bool) -> None:
    """Raise ``UserError`` for what a next-token module leaves no choice of."""
    if aux_layers or adapt:
        chosen = "aux_layers" if aux_layers else "adapt"
        raise UserError(f"<{chosen}>: {config} is a base's, whose next-token module has none")


def _open(
    files: DraftFiles,
    base: BaseInfo,
    *,
    chosen: tuple[int, ...] | None,
    adapt: bool,
    base_directory: str | Path | None,
) -> StoredDraft:
    source = str(files.path / "config.json")
    draft = parse_hf_draft(files.config, files.shapes, source)
    check_base(draft, base, source=source, adapt=adapt)
    algorithm = _algorithm(draft, source)
    aux_layers = _aux_layers(draft, base, algorithm=algorithm, chosen=chosen, source=source)
    info = _info(draft, base, algorithm=algorithm, aux_layers=aux_layers, source=source)
    order, vocab_ids = read_vocabulary(files, draft)
    entries = draft_entries(info, fmt_of(files))
    check_tensors(files, entries, info)
    if base_directory is not None and not adapt:
        check_embedding(files, base_directory)
    return stored_draft(files, entries, info, order=order, vocab_ids=vocab_ids)


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
    named = _named_aux_layers(draft, base, source)
    if named is not None and chosen not in (None, named):
        raise UserError(f"{source}: reads aux layers {list(named)}, not {list(chosen or ())}")
    aux_layers = named or DraftSpec(aux_layers=chosen).aux_layers_of(layers)
    if aux_layers[-1] >= layers:
        raise UserError(
            f"{source}: reads aux layer {aux_layers[-1]}, the base {base.name} has {layers} layers"
        )
    return aux_layers


def _named_aux_layers(draft: HfDraft, base: BaseInfo, source: str) -> tuple[int, ...] | None:
    """Return the layers whose outputs servers would capture for this draft, or None where
    config.json names none."""
    inner, outer = draft.inner_ids, draft.outer_ids
    outputs = [] if inner is None else outputs_of_inner_ids(base, inner)
    of_outer = [] if outer is None else [i - 1 for i in outer]
    # convert's format hf keeps to one convention beside every base.
    if inner is not None and of_outer == list(inner):
        outputs = of_outer
    if outputs and of_outer and outputs != of_outer:
        raise UserError(
            f"{source}: eagle_aux_hidden_state_layer_ids {list(outer or ())} and that of "
            f"eagle_config, {list(inner or ())}, name different layers"
        )
    aux_layers = outputs or of_outer
    if aux_layers and aux_layers[0] < 0:
        raise UserError(
            f"{source}: aux layers must ascend and be outputs of layers, found {aux_layers}"
        )
    return tuple(aux_layers) or None


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
            qk_layernorm=draft.qk_layernorm,
            **widths_of(draft, base),
        )
        layer_widths(spec, base.megatron_args)
    except UserError as error:
        raise UserError(f"{source}: {message_of(error)}") from None
    return DraftInfo(spec, base, TrainOptions().ttt_steps)


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
