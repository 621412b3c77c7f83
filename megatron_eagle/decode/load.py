"""Loading of base and draft from their checkpoints, in any layout, without the trainer.

They are without sequence parallelism, and by default in fp32 and made of Megatron-Core's own
modules, so that speculative and greedy answers can be compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.base_fields import check_complete, cut_sizes
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import CUT, for_stages, megatron_layers, pattern_of
from megatron_eagle.checkpoint.loading import load_sharded
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.build import build_draft
from megatron_eagle.draft.layer_config import Rotary, draft_rotary
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.draft.info import BASE_SIZES, DraftInfo, parse_draft_info
from megatron_eagle.layers.backend import LOCAL, LayerBackend, backend_of, local_backend
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.pipeline.replicas import as_replica, equal_start
from megatron_eagle.teacher.base import FrozenBase
from megatron_eagle.teacher.build import base_config, build_base
from megatron_eagle.teacher.build import load_base as load_base_weights
from megatron_eagle.teacher.targets import TeacherHead
from megatron_eagle.teacher.vocab_shards import VocabShards
from megatron_eagle.user_files import reading


@dataclass(frozen=True)
class DraftCheckpointInfo:
    """What a draft's checkpoint says of it: ``vocab_ids`` [D], ``metadata`` as saved."""

    info: DraftInfo
    vocab_ids: Tensor
    metadata: Tensor


def load_base(
    directory: str | Path,
    base: BaseInfo,
    pg_collection: Any,
    aux_layers: Sequence[int] = (),
    *,
    implementation: str = LOCAL,
    dtype: torch.dtype = torch.float32,
) -> FrozenBase:
    """Load the base, on a pipeline stage that stage's layers. Collective over all ranks.

    Layers that the stages do not divide evenly go to the first one. ``aux_layers``: ids of the
    layers whose outputs the draft reads. ``implementation`` is what the layers of base and draft
    are made of, see ``layers.backend``, and ``dtype`` their precision. Raises ``UserError`` when
    the tensor-parallel ranks do not divide its heads, when it has fewer layers than there are
    stages, or naming the directory when it cannot be loaded.
    """
    args, groups = base.megatron_args, pg_collection
    check_complete(args, f"<base_checkpoint> {literal(directory)}")
    ranks, stages, experts = groups.tp.size(), groups.pp.size(), groups.ep.size()
    for name, size in cut_sizes(args).items():
        if size % ranks:
            raise UserError(
                f"<tensor_model_parallel_size> {ranks} does not divide the base's {name} = {size}"
            )
    layers = megatron_layers(args)
    if layers < stages:
        raise UserError(
            f"<pipeline_model_parallel_size> {stages} exceeds the base's {layers} layers"
        )
    if experts > 1 and (args.get("num_experts") or 0) % experts:
        raise UserError(
            f"<expert_model_parallel_size> {experts} does not divide the base's "
            f"{args['num_experts']} experts"
        )
    config = base_config(
        base,
        ranks,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        num_layers_in_first_pipeline_stage=_first_stage(args, stages),
        context_parallel_size=groups.cp.size(),
        expert_model_parallel_size=experts,
    )
    config.perform_initialization = False
    config.transformer_impl = implementation
    ends = (groups.pp.rank() == 0, groups.pp.rank() == stages - 1)
    gpt = build_base(config, base, backend_of(implementation), groups, *ends)
    shards = VocabShards(gpt)
    load_base_weights(gpt, directory, shards)
    frozen = FrozenBase(gpt, aux_layers, base.vocab_size, shards)
    return frozen.to(dtype).cuda(torch.cuda.current_device())  # torch's norms begin in fp32


def _first_stage(args: Mapping[str, Any], stages: int) -> int | None:
    """Return the number of layers on the first stage, None if all stages have as many or the
    pattern of a HybridModel cuts them."""
    if CUT in for_stages(pattern_of(args) or "", stages):
        return None
    layers = megatron_layers(args)
    return None if layers % stages == 0 else layers - (stages - 1) * (layers // stages)


def read_draft(directory: str | Path, source: str) -> DraftCheckpointInfo:
    """Read what the checkpoint in ``directory`` (or one of its iterations) says of its draft; a
    ``UserError`` starts with ``source``."""
    keys = ("draft.metadata", "draft.vocab_ids")
    tensors = CheckpointReader.open(directory).load(keys)
    metadata, vocab_ids = (tensors[key] for key in keys)
    info = parse_draft_info(metadata, source)
    check_vocab_ids(vocab_ids, info.base.vocab_size, source)
    return DraftCheckpointInfo(info, vocab_ids, metadata)


def read_draft_info(directory: str | Path, base: BaseInfo) -> DraftCheckpointInfo:
    """Read the same, and raise ``UserError`` when the draft was trained for a base of other
    dimensions."""
    source = f"<draft> {directory}"
    with reading("draft", directory):
        about = read_draft(directory, source)
    for name in (*BASE_SIZES, "vocab_size"):
        trained, given = about.info.base.megatron_args[name], base.megatron_args[name]
        if trained != given:
            raise UserError(
                f"{source}: trained for a base with {name} = {trained}, "
                f"<base_checkpoint> has {given}"
            )
    return about


def fresh_draft(
    about: DraftCheckpointInfo, base: FrozenBase, exchange: StageExchange | None = None
) -> EagleDraft:
    """Build a draft of the checkpoint's shape and vocabulary as training starts it: random weights
    from this process's generators (on pipeline stages the first one's), aux layers scaled to one
    size."""
    draft = _build(about, base, initialize=True)
    if isinstance(draft, BlockDraft):
        draft.copy_head(
            TeacherHead(
                base.output_weight, base.vocab_size, draft.vocab_ids, base.tp_group
            ).draft_weight
        )
    draft.start_evenly(lambda: base.layer_sizes(exchange or StageExchange(base)))
    if exchange is not None and exchange.stages > 1:
        equal_start(draft, base.gpt.pg_collection.pp)
    return draft


def load_draft(about: DraftCheckpointInfo, base: FrozenBase, directory: str | Path) -> EagleDraft:
    """Load the draft that training saved, in whatever layout, whole on every pipeline stage. A
    collective of all ranks.

    Raises ``UserError`` naming the directory when it cannot be loaded.
    """
    stage = base.gpt.pg_collection.pp.rank()
    return restore(_build(about, base, initialize=False), directory, stage)


def restore(draft: EagleDraft, directory: str | Path, stage: int = 0) -> EagleDraft:
    """Load the checkpoint in ``directory`` into ``draft``, a replica on pipeline stage ``stage``,
    and return it. Strict; a collective of all ranks."""
    path = CheckpointReader.open(directory).directory
    sharded = as_replica(draft.sharded_state_dict(prefix="draft."), stage)
    state = load_sharded(sharded, path, f"<draft> {literal(directory)}")
    own = {key.removeprefix("draft."): value for key, value in state.items()}
    lacking, _ = draft.load_state_dict(own, strict=False)
    if lacking:
        raise UserError(f"<draft> {directory}: lacks {lacking[0]}")
    return draft


def _build(about: DraftCheckpointInfo, base: FrozenBase, initialize: bool) -> EagleDraft:
    spec, device = about.info.spec, base.embedding_weight.device
    ranks = base.gpt.pg_collection.ep.size()
    if (spec.num_experts or 0) % ranks:
        raise UserError(
            f"<expert_model_parallel_size> {ranks} does not divide the draft's "
            f"{spec.num_experts} experts"
        )
    draft = frozen_draft(
        about,
        base.config,
        base.gpt.pg_collection,
        backend=backend_of(base.config.transformer_impl),
        base_head=lambda: base.output_weight,
        base_head_rows=base.output_weight.shape[0],
        rotary=draft_rotary(base.rotary, about.info.base, spec, device),
        initialize=initialize,
    )
    return draft.to(base.config.params_dtype)


def frozen_draft(
    about: DraftCheckpointInfo,
    base_config: Any,
    pg_collection: Any,
    *,
    base_head: Callable[[], Tensor],
    base_head_rows: int,
    rotary: Rotary,
    initialize: bool,
    backend: LayerBackend | None = None,
) -> EagleDraft:
    """Build a draft of the checkpoint's shape, frozen, on this rank's device; the arguments are
    those of :func:`~megatron_eagle.draft.build.build_draft`, ``backend`` by default the local one.
    """
    draft = build_draft(
        spec=about.info.spec,
        num_aux=len(about.info.aux_layers),
        base_config=base_config,
        backend=backend or local_backend(),
        vocab_ids=about.vocab_ids,
        vocab_size=about.info.base.vocab_size,
        base_head=base_head,
        base_head_rows=base_head_rows,
        rotary=rotary,
        metadata=about.metadata,
        pg_collection=pg_collection,
        device=torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu"),
        initialize=initialize,
    )
    return draft.requires_grad_(False).eval()
