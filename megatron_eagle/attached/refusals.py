"""Refuse, in one line each, a model beside which no draft can be trained, and a draft that does not
fit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attached.capture import embedding_weight, output_weight
from megatron_eagle.attached.model_kinds import layers_of_model, pattern_of_model
from megatron_eagle.compat import GPTModel, require, unwrap_model
from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions
from megatron_eagle.config.option import given, shown
from megatron_eagle.config.widths import TP_WIDTHS, layer_widths
from megatron_eagle.draft.vocab import check_vocab_ids
from megatron_eagle.errors import UserError

USED_OPTIONS = frozenset(
    (
        "ttt_steps",
        "loss",
        "lk_decay",
        "step_decay",
        "regression_weight",
        "moe_aux_loss_coeff",
        "detach_steps",
        "mask_out_of_vocab",
        "logits_budget_mib",
        "teacher_memory",
        "loss_chunk_mib",
    )
)
"""Options of a training run that mean something in a trainer of somebody else's."""

_HYBRID_MODEL = "megatron.core.models.hybrid.hybrid_model:HybridModel"
_POSITIONS = ("rope", "learned_absolute", "none")


def whole_model(model: Any) -> Any:
    """Return the GPTModel or HybridModel in ``model``, without its wrappers.

    Raises ``UserError`` for pipeline stages, for a model whose weights are not whole on this rank,
    for what is neither, and for layers that no description knows.
    """
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    if len(chunks) != 1:
        raise UserError(
            f"<model>: a list of {len(chunks)} virtual pipeline stages; a draft is attached to a "
            "model that is whole on its rank"
        )
    if "FullyShardedDataParallel" in type(chunks[0]).__name__:
        raise UserError(
            "<model>: fully sharded data parallelism frees the output layer's weight after the "
            "forward, and the teacher needs it; use Megatron's DistributedDataParallel"
        )
    gpt = unwrap_model(chunks[0])
    if not isinstance(gpt, (GPTModel, require(_HYBRID_MODEL))):
        raise UserError(
            f"<model>: a draft is attached to a GPTModel or HybridModel, not to a {_kind(gpt)}"
        )
    pattern_of_model(gpt)
    stages = gpt.config.pipeline_model_parallel_size
    if stages > 1 or not (gpt.pre_process and gpt.post_process):
        raise UserError(
            f"<pipeline_model_parallel_size> {stages}: the draft reads layers of all stages, and a "
            "trainer's own schedule sends from stage to stage what the next layer needs and no "
            "more; attach to a model without pipeline stages, or train the draft beside a saved "
            "base with megatron-eagle train, whose schedule carries them"
        )
    _check_config(gpt)
    return gpt


def _check_config(gpt: Any) -> None:
    config = gpt.config
    unseen = {
        "cuda_graph_impl": ("none", "hooks do not run when a graph is replayed"),
        "overlap_moe_expert_parallel_comm": (False, "its schedule does not call the forward"),
        "use_mup": (False, "it scales the logits after the output layer"),
        "hybrid_context_parallel": (False, "its ranks hold sequences of other lengths"),
    }
    for name, (accepted, reason) in unseen.items():
        if getattr(config, name, accepted) != accepted:
            raise UserError(f"{shown(name, getattr(config, name))} of <model>: {reason}")
    kind = gpt.position_embedding_type
    if kind not in _POSITIONS:
        raise UserError(
            f"<position_embedding_type> {kind} of <model>: not one of {', '.join(_POSITIONS)}"
        )
    for name, weight in (("embedding", embedding_weight(gpt)), ("output", output_weight(gpt))):
        rows = gpt.vocab_size // gpt.pg_collection.tp.size()
        if tuple(weight.shape) != (rows, config.hidden_size):
            raise UserError(
                f"<model>: the {name} weight on this rank is {list(weight.shape)}, expected "
                f"{[rows, config.hidden_size]}: it must be whole over data parallelism"
            )


def check_options(gpt: Any, options: EagleConfig, vocab_size: int, dtype: torch.dtype) -> None:
    """Raise ``UserError`` for an option that does not fit the model or would be ignored."""
    spec, train = options.spec, options.train
    if spec.method.drafts_blocks:
        raise UserError(
            f"<algorithm> {spec.algorithm}: its anchors are drawn by the number of a sample, which "
            "the trainer of <model> does not tell; train it with megatron-eagle train"
        )
    if spec.method.is_base_module:
        raise UserError(
            f"<algorithm> {spec.algorithm}: the base's own module is read from its Hugging Face "
            "files, and <model> has none; train it with megatron-eagle train"
        )
    for name, value in given(train).items():
        if name not in USED_OPTIONS:
            raise UserError(f"{shown(name, value)}: the trainer's own, no option of attach")
    if not 0 < vocab_size <= gpt.vocab_size:
        raise UserError(
            f"<vocab_size> {vocab_size}: the tokenizer's, without padding; <model> has "
            f"{gpt.vocab_size} rows"
        )
    options.check_against_base(layers_of_model(gpt), vocab_size, train.ttt_steps + 2)
    if spec.uses_mla:
        raise UserError(
            "<attention> mla: a draft beside a model in memory has grouped queries (gqa), which "
            "any model may have beside it"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"<dtype> {dtype}: a draft is trained in torch.float32 or torch.bfloat16")
    head = output_weight(gpt).dtype
    if spec.method.shares_base_head and dtype != head:
        raise UserError(
            f"<dtype> {dtype}: an {spec.algorithm} draft multiplies by the model's output layer, "
            f"which is {head}"
        )


def check_widths(spec: DraftSpec, config: Any, train: TrainOptions) -> None:
    """Raise ``UserError`` unless tensor and expert parallelism divide the draft's widths; those of
    the model, which it has by default, are in ``config``."""
    tensor = config.tensor_model_parallel_size
    for name, width in layer_widths(spec, vars(config)).items():
        if name in TP_WIDTHS and width % tensor:
            raise UserError(
                f"<{name}>: the draft's {width} are not divided by tensor parallelism {tensor}"
            )
    if spec.num_experts is None:
        return
    if tensor > 1 and not config.sequence_parallel:
        raise UserError(f"<num_experts> {spec.num_experts}: needs sequence parallelism with TP")
    if spec.num_experts % config.expert_model_parallel_size:
        raise UserError(
            f"<num_experts> {spec.num_experts}: not divided by expert parallelism "
            f"{config.expert_model_parallel_size}"
        )
    if config.expert_tensor_parallel_size not in (None, tensor):
        raise UserError(
            f"<num_experts> {spec.num_experts}: not supported with expert tensor parallelism "
            f"{config.expert_tensor_parallel_size} beside tensor parallelism {tensor}"
        )


def chosen_vocab_ids(spec: DraftSpec, vocab_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Return the draft's token ids int64 [D] on the host: ``vocab_ids``, or all of them.

    Raises ``UserError`` unless ``draft_vocab_size`` of ``spec`` and the ids agree.
    """
    size = spec.draft_vocab_size
    if vocab_ids is None:
        if size not in (None, vocab_size):
            raise UserError(
                f"<draft_vocab_size> {size} needs <vocab_ids>, the token ids to draft: "
                "megatron_eagle.draft.vocab.choose_vocab_ids picks them by their counts"
            )
        return torch.arange(vocab_size)
    ids = vocab_ids.cpu().long()
    check_vocab_ids(ids, vocab_size, "<vocab_ids>")
    if ids.numel() != (size or vocab_size):
        raise UserError(
            f"<vocab_ids> are {ids.numel()} ids, <draft_vocab_size> is {size or vocab_size}"
        )
    return ids


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"
