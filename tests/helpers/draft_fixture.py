"""A small EagleGPTModel with the reference's weights, its base replaced by given tensors.

Runs inside a rank of ``run_distributed``; the reference itself never enters a rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.mla_fixture import mla_names, mla_sizes
from tests.reference.layers import ReferenceConfig


@dataclass(frozen=True)
class Case:
    """One comparison: sizes, layout, and the tensors that reference and package share."""

    config: ReferenceConfig
    weights: dict[str, Tensor]
    vocab_ids: Tensor
    embedding: Tensor
    output_weight: Tensor
    aux: Tensor
    final_hidden: Tensor
    tokens: Tensor
    loss_mask: Tensor
    sequence_parallel: bool = False
    logits_budget_mib: int = 256
    loss_chunk_mib: int | None = None
    recompute_modules: tuple[str, ...] = ()
    trim: bool = False
    compile: bool = False
    cp: int = 1
    positions: Tensor | None = None
    every_row: bool = False
    layers: str = "local"
    counted: list[str] = field(default_factory=list)


def build_model(case: Case) -> Any:
    """EagleGPTModel on this rank, with this rank's shards of the case's weights, float32."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    from megatron_eagle.config import EagleConfig
    from megatron_eagle.draft.build import build_draft
    from megatron_eagle.draft.layer_config import Rotary
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.layers.backend import backend_of
    from megatron_eagle.model import EagleGPTModel

    groups = draft_groups()
    reference = case.config
    world = groups.tp.size()
    kind = MLATransformerConfig if reference.kv_lora_rank else TransformerConfig
    config = kind(
        num_layers=reference.num_layers,
        hidden_size=reference.hidden_size,
        ffn_hidden_size=reference.intermediate_size,
        num_attention_heads=reference.num_heads,
        num_query_groups=reference.num_kv_heads,
        kv_channels=reference.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=reference.rms_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=world,
        context_parallel_size=groups.cp.size(),
        sequence_parallel=case.sequence_parallel,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        transformer_impl=case.layers,
        calculate_per_token_loss=True,
        recompute_granularity="selective" if case.recompute_modules else None,
        recompute_modules=list(case.recompute_modules) or None,
        **mla_sizes(reference),
    )
    base = GivenBase(config, case, groups.tp)
    options = EagleConfig.of(
        ttt_steps=reference.ttt_steps,
        step_decay=reference.step_decay,
        mask_out_of_vocab=reference.mask_out_of_vocab,
        detach_steps=reference.detach_steps,
        logits_budget_mib=case.logits_budget_mib,
        loss_chunk_mib=case.loss_chunk_mib,
        **draft_options(reference),
    )
    draft = build_draft(
        spec=options.spec,
        num_aux=reference.num_aux,
        base_config=config,
        backend=backend_of(case.layers),
        vocab_ids=case.vocab_ids,
        vocab_size=reference.vocab_size,
        base_head=lambda: base.output_weight,
        base_head_rows=base.output_weight.shape[0],
        rotary=Rotary(base.rotary, base.rope_factor),
        metadata=encode_metadata({}),
        pg_collection=groups,
        device=base.output_weight.device,
        moe_aux_loss_coeff=options.moe_aux_loss_coeff,
    )
    load_reference_weights(draft, case)
    return EagleGPTModel(base, draft, options)


def draft_options(reference: ReferenceConfig) -> dict[str, Any]:
    """The options that give the reference's draft."""
    widths: dict[str, Any] = {
        "num_layers": reference.num_layers,
        "ffn_hidden_size": reference.intermediate_size,
        "num_attention_heads": reference.num_heads,
    }
    if reference.kv_lora_rank:
        widths |= {
            "attention": "mla",
            "q_lora_rank": reference.q_lora_rank,
            "kv_lora_rank": reference.kv_lora_rank,
            "qk_head_dim": reference.head_dim,
            "qk_pos_emb_head_dim": reference.qk_rope_head_dim,
            "v_head_dim": reference.v_head_dim,
        }
    else:
        widths |= {"num_query_groups": reference.num_kv_heads, "kv_channels": reference.head_dim}
    widths |= {"loss": reference.loss}
    if reference.num_experts:
        widths |= {"num_experts": reference.num_experts, "moe_router_topk": reference.topk}
        widths |= {"moe_aux_loss_coeff": reference.balance}
    if reference.loss == "lk-lambda":
        widths |= {"lk_decay": reference.lk_decay}
    if reference.eagle1:
        return {**widths, "algorithm": "eagle1", "regression_weight": reference.regression}
    if reference.mask_token is not None:
        widths |= {"qk_layernorm": reference.qk_norm}
        return {**widths, "algorithm": "p-eagle", "mask_token": reference.mask_token}
    assert reference.fc_norm == reference.norm_output
    return {
        **widths,
        "algorithm": "eagle3.1" if reference.fc_norm else "eagle3",
        "norm_before_fc": reference.norm_before_fc,
        "norm_before_residual": reference.norm_before_residual,
        "qk_layernorm": reference.qk_norm,
    }


def draft_spec(
    reference: ReferenceConfig, aux_layers: tuple[int, ...] = (), vocab_size: int | None = None
) -> Any:
    """The DraftSpec of the reference's draft, as a checkpoint stores it."""
    from megatron_eagle.config import EagleConfig

    spec = EagleConfig.of(**draft_options(reference)).spec
    return dataclasses.replace(spec, aux_layers=aux_layers or None, draft_vocab_size=vocab_size)


class GivenBase(torch.nn.Module):
    """Stands for FrozenBase: gives the case's captured layers and final hidden as a base of this
    layout would, its vocabulary padded to a multiple of 4 * TP."""

    def __init__(self, config: Any, case: Case, group: Any) -> None:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        from megatron_eagle.attention.rope import attention_factor, set_frequencies

        super().__init__()
        self.config, self.case, self.tp_group = config, case, group
        self.cp_group = draft_groups().cp
        self.vocab_size = case.config.vocab_size
        self.capture = SimpleNamespace(local_layers=())
        self.gpt = torch.nn.Module()
        self.gpt.pg_collection = draft_groups()
        scaling = case.config.rope_scaling
        self.rope = RotaryEmbedding(
            case.config.qk_rope_head_dim or case.config.head_dim, 1.0,
            rotary_base=int(case.config.rope_theta), use_cpu_initialization=True,
        )  # fmt: skip
        self.rope_factor = 1.0
        if scaling is not None:
            rope = {"rope_theta": case.config.rope_theta, "truncate": True, **scaling}
            set_frequencies(self.rope, rope)
            self.rope_factor = attention_factor(rope)
        self.embedding_weight = self._shard(case.embedding)
        self.output_weight = self._shard(case.output_weight)

    def _shard(self, full: Tensor) -> Tensor:
        world, rank = self.tp_group.size(), self.tp_group.rank()
        rows = -(-full.shape[0] // (4 * world)) * 4
        padded = torch.full((rows * world, full.shape[1]), 100.0)  # padding must never be seen
        padded[: full.shape[0]] = full
        return padded[rank * rows : (rank + 1) * rows].contiguous()

    def rotary(self, length: int) -> Tensor:
        return self.rope(length, packed_seq=True)

    def forward(self, tokens: Tensor, packing: Any = None) -> Any:
        from megatron_eagle.teacher.base import BaseOutputs

        return BaseOutputs(
            self._part(self.case.aux, tokens), self._part(self.case.final_hidden, tokens)
        )

    def gather_final(self, final: Tensor, halo: int) -> Tensor:
        from megatron_eagle.teacher.base import FrozenBase

        return FrozenBase.gather_final(self, final, halo)

    def _part(self, whole: Tensor, tokens: Tensor) -> Tensor:
        """[B, S, H] -> this rank's [S', B, H]."""
        length, world, rank = tokens.shape[1], self.cp_group.size(), self.cp_group.rank()
        part = whole[:, :length].transpose(0, 1)
        if world > 1:
            pieces = part.chunk(2 * world)
            part = torch.cat([pieces[rank], pieces[2 * world - 1 - rank]])
        if self.config.sequence_parallel:
            part = part.chunk(self.tp_group.size())[self.tp_group.rank()]
        return part.contiguous()


def draft_groups() -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def megatron_names(
    case: Case, experts: tuple[int, int] = (0, 1)
) -> dict[str, tuple[list[str], str]]:
    """Package parameter -> (reference parameters, how they are joined and sharded). ``experts``:
    this rank and the size of its expert-parallel group."""
    one, eagle1 = case.config.num_layers == 1, case.config.eagle1
    names = {"fc.weight": (["fc.weight"], "rows" if not case.sequence_parallel else "whole")}
    if not eagle1:
        names |= {
            "norm.weight": (["norm.weight"], "whole"),
            "lm_head.weight": (["lm_head.weight"], "vocab"),
        }
    norms = [f"fc_norm.{i}.weight" for i in range(case.config.num_aux) if case.config.fc_norm]
    norms += ["input_norm.weight"] if case.config.norm_before_fc else []
    names |= {name: ([name], "whole") for name in norms}
    if case.config.mask_token is not None:
        names["mask_hidden.weight"] = (["mask_hidden"], "whole")
    for i in range(case.config.num_layers):
        ours, theirs = f"layers.{i}.", "midlayer." if one else f"layers.{i}."
        if i == 0 and not eagle1:
            names |= {
                f"{ours}input_layernorm.embedding_norm.weight": (
                    [f"{theirs}input_layernorm.weight"], "whole"),
                f"{ours}input_layernorm.hidden_norm.weight": (
                    [f"{theirs}hidden_norm.weight"], "whole"),
            }  # fmt: skip
        elif i > 0:
            names[f"{ours}input_layernorm.weight"] = ([f"{theirs}input_layernorm.weight"], "whole")
        attention = f"{theirs}self_attn."
        if case.config.kv_lora_rank:
            names |= mla_names(f"{ours}self_attention.", attention, case.config.q_lora_rank > 0)
        else:
            names[f"{ours}self_attention.linear_qkv.weight"] = (
                [f"{attention}{x}_proj.weight" for x in "qkv"], "qkv")  # fmt: skip
            for x in "qk" if case.config.qk_norm else "":
                ours_norm = f"{ours}self_attention.{x}_layernorm.weight"
                names[ours_norm] = ([f"{attention}{x}_norm.weight"], "whole")
        names |= {
            f"{ours}self_attention.linear_proj.weight": ([f"{attention}o_proj.weight"], "columns"),
            f"{ours}pre_mlp_layernorm.weight": (
                [f"{theirs}post_attention_layernorm.weight"], "whole"),
        }  # fmt: skip
        mlps = {f"{ours}mlp.": f"{theirs}mlp."}
        if case.config.num_experts:
            names[f"{ours}mlp.router.weight"] = ([f"{theirs}mlp.gate.weight"], "whole")
            count = case.config.num_experts // experts[1]
            mlps = {
                f"{ours}mlp.experts.local_experts.{e}.": (
                    f"{theirs}mlp.experts.{e + experts[0] * count}."
                )
                for e in range(count)
            }
        for mine, its in mlps.items():
            names |= {
                f"{mine}linear_fc1.weight": (
                    [f"{its}gate_proj.weight", f"{its}up_proj.weight"], "gated"),
                f"{mine}linear_fc2.weight": ([f"{its}down_proj.weight"], "columns"),
            }  # fmt: skip
    return names


def local_part(parts: list[Tensor], kind: str, case: Case, rank: int, world: int) -> Tensor:
    """This rank's tensor made of full reference tensors ``parts``."""
    whole = parts[0]
    if kind == "whole":
        return whole
    if kind == "rows":
        return whole.chunk(world, 0)[rank]
    if kind == "columns":
        return whole.chunk(world, 1)[rank]
    if kind == "gated":
        return torch.cat([part.chunk(world, 0)[rank] for part in parts])
    if kind == "qkv":
        groups, size = case.config.num_kv_heads, parts[0].shape[1]
        stacked = torch.cat([part.view(groups, -1, size) for part in parts], dim=1)
        return stacked.chunk(world, 0)[rank].reshape(-1, size)
    assert kind == "vocab"
    return whole


def _local_name(name: str) -> str:
    """The name that a parameter of Transformer Engine's layers has in Megatron's own: a norm in
    front of a product is part of it."""
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")


def load_reference_weights(draft: Any, case: Case) -> None:
    """Copy this rank's shards of the case's weights into ``draft``."""
    world, rank = draft.tp_group.size(), draft.tp_group.rank()
    parameters = {_local_name(name): p for name, p in draft.named_parameters()}
    ep_group = draft_groups().ep
    names = megatron_names(case, (ep_group.rank(), ep_group.size()))
    assert set(parameters) == set(names), set(parameters) ^ set(names)
    with torch.no_grad():
        for name, (sources, kind) in names.items():
            part = local_part([case.weights[s] for s in sources], kind, case, rank, world)
            if kind == "vocab":
                shard = draft.shard
                parameters[name].zero_()
                parameters[name][: shard.rows] = part[shard.start : shard.start + shard.rows]
            else:
                parameters[name].copy_(part)
