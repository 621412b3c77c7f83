"""Small trainable GPTs of several kinds, trained with a draft attached, in any layout.

Runs inside ranks of ``run_distributed``. The inputs of the oracle are read by hooks of this file
from the same GPT on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel

HIDDEN, VOCAB, PADDED, SEQUENCES, LENGTH = 32, 61, 64, 4, 24
AUX = (0, 1, 3)
PATTERN = "*-*E*-*-"


@dataclass(frozen=True)
class AttachedCase:
    """A model, a layout of two ranks, and a draft; ``spec`` and ``train`` are options by name."""

    base: str = "llama"
    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    draft_vocab: int | None = 23
    vocab: Tensor | None = None
    documents: bool = False
    fmt: str = "hf"

    def vocab_ids(self) -> Tensor | None:
        if self.draft_vocab is None or self.vocab is not None:
            return self.vocab
        generator = torch.Generator().manual_seed(7)
        return torch.randperm(VOCAB, generator=generator)[: self.draft_vocab].sort().values


@dataclass(frozen=True)
class Data:
    """Four sequences [4, S] and their masks, cut into micro-batches of two."""

    tokens: Tensor
    loss_mask: Tensor
    position_ids: Tensor

    @classmethod
    def make(cls, documents: bool) -> Data:
        generator = torch.Generator().manual_seed(11)
        tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator)
        mask = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.6
        positions = torch.arange(LENGTH).repeat(SEQUENCES, 1)
        if documents:
            starts = torch.tensor([7, 10, 12, 15]).unsqueeze(1)
            positions = torch.where(positions < starts, positions, positions - starts)
        return cls(tokens, mask.float(), positions)


def begin(tp: int = 1, cp: int = 1, ep: int = 1) -> Any:
    """Process groups of a layout; an earlier one of this process ends."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return megatron_parallel(tp=tp, cp=cp, ep=ep)


def make_gpt(kind: str, groups: Any, sequence_parallel: bool = False, **changes: Any) -> Any:
    """A GPTModel in train mode: ``llama``, ``gpt2`` (tied, biases, learned positions), ``moe`` or
    ``mtp``; or a HybridModel, ``hybrid``; ``changes`` are fields of its TransformerConfig."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import TransformerConfig

    gpt2 = kind == "gpt2"
    fields: dict[str, Any] = {
        "num_layers": len(PATTERN) if kind == "hybrid" else 4,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 4 if gpt2 else 2,
        "kv_channels": 8,
        "normalization": "LayerNorm" if gpt2 else "RMSNorm",
        "gated_linear_unit": not gpt2,
        "activation_func": torch.nn.functional.gelu if gpt2 else torch.nn.functional.silu,
        "add_bias_linear": gpt2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": groups.tp.size(),
        "context_parallel_size": groups.cp.size(),
        "expert_model_parallel_size": groups.ep.size(),
        "sequence_parallel": sequence_parallel,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "use_cpu_initialization": True,
        "init_method_std": 0.2,
    }
    if kind == "moe":
        fields |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
        fields |= {"moe_token_dispatcher_type": "alltoall", "moe_aux_loss_coeff": 0.01}
    if kind == "mtp":
        fields |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
    if kind == "hybrid":
        fields |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
        fields |= {"moe_token_dispatcher_type": "alltoall", "is_hybrid_model": True}
    config = TransformerConfig(**(fields | changes))
    if kind == "hybrid":
        return make_hybrid(config, groups)
    if groups.cp.size() > 1:  # Megatron's local attention has no context parallelism
        from megatron_eagle.layers.backend import local_backend

        spec = local_backend().base_spec(config, 0)
    else:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=gpt2,
        position_embedding_type="learned_absolute" if gpt2 else "rope",
        rotary_base=10000,
        mtp_block_spec=mtp if kind == "mtp" else None,
        pg_collection=groups,
    ).train()


def make_hybrid(config: Any, groups: Any) -> Any:
    """A HybridModel of attention, MLPs and experts in train mode, in four layers of two symbols."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_eagle.layers.backend import local_backend

    return HybridModel(
        config=config,
        hybrid_stack_spec=local_backend().hybrid_spec(config, PATTERN, True),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=PATTERN,
        position_embedding_type="rope",
        rotary_base=50000,
        pg_collection=groups,
    ).train()


def in_ddp(config: Any, module: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(config, DistributedDataParallelConfig(), module)


def own_part(whole: Tensor, groups: Any) -> Tensor:
    """This context-parallel rank's columns of [B, S], as Megatron's trainer cuts them."""
    world, rank = groups.cp.size(), groups.cp.rank()
    if world == 1:
        return whole
    pieces = whole.chunk(2 * world, dim=1)
    return torch.cat([pieces[rank], pieces[2 * world - 1 - rank]], dim=1)


def micro_batches(data: Data, groups: Any) -> list[Data]:
    """This rank's micro-batches of two sequences, as its trainer has them."""
    rank, world = groups.dp.rank(), groups.dp.size()
    rows = torch.arange(SEQUENCES).chunk(world)[rank].split(2)
    parts = [[x[r] for x in (data.tokens, data.loss_mask, data.position_ids)] for r in rows]
    return [Data(*(own_part(x, groups) for x in part)) for part in parts]


def run_model(model: Any, part: Data) -> Tensor:
    """The model's own loss of a micro-batch: its forward, with labels."""
    labels = part.tokens.roll(-1, 1)
    losses = model(part.tokens, part.position_ids, None, labels=labels, loss_mask=part.loss_mask)
    return (losses * part.loss_mask).sum()


def oracle_inputs(gpt: Any, data: Data) -> dict[str, Tensor]:
    """What the oracle reads of a model that is whole: hidden states and logits, batch first."""
    kept: dict[int, Tensor] = {}
    final: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: kept.__setitem__(m.layer_number - 1, out[0]))
        for layer in gpt.decoder.layers
    ]
    handles.append(gpt.decoder.register_forward_hook(lambda m, a, out: final.append(out)))
    with torch.no_grad():
        logits = gpt(data.tokens, data.position_ids, None)
    for handle in handles:
        handle.remove()
    step = len(gpt.decoder.layers) // 4  # symbols of a layer: two of the hybrid model
    tied = gpt.share_embeddings_and_output_weights
    output = gpt.embedding.word_embeddings.weight if tied else gpt.output_layer.weight
    return {
        "aux": torch.cat([kept[step * i + step - 1] for i in AUX], dim=-1).transpose(0, 1),
        "final": final[0].transpose(0, 1),
        "logits": logits[..., :VOCAB],
        "embedding": gpt.embedding.word_embeddings.weight.detach()[:VOCAB],
        "output": output.detach()[:VOCAB],
    }
