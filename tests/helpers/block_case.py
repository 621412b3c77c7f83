"""Random block drafts, run by the oracle and by the package on several ranks, and compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.objective.block_batch import BlockBatch, BlockShape, draw_anchors
from megatron_eagle.testing.harness import megatron_parallel
from tests.helpers.draft_fixture import GivenBase, draft_groups, local_part
from tests.helpers.reference_case import close
from tests.reference.blocks import BlockConfig, ReferenceBlocks, judged_slots

HIDDEN, LENGTH, BATCH = 32, 24, 2
TOLERANCE = 1e-5
STARTS = [[0, 9, 13, 24], [0, 2, 3, 17, 24]]
"""Starts of the documents in each of the two packed sequences, and their end."""
CONFIG = BlockConfig(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=61,  # divided by neither 2 nor 4
    draft_vocab_size=61,
    mask_token=7,
)
COMPRESSED = {"draft_vocab_size": 23}
DSPARK = {"next_token": True, "markov": "vanilla", "ce": 0.1, "l1": 0.9, "confidence": True}


@dataclass(frozen=True)
class BlockCase:
    """One comparison: sizes, layout, and the tensors that oracle and package share."""

    config: BlockConfig
    weights: dict[str, Tensor]
    vocab_ids: Tensor
    embedding: Tensor
    output_weight: Tensor
    aux: Tensor
    final_hidden: Tensor
    tokens: Tensor
    loss_mask: Tensor
    sequence_parallel: bool = False
    cp: int = 1
    anchors: int = 512
    window: int = 4
    logits_budget_mib: int = 256
    loss_chunk_mib: int | None = None
    positions: Tensor | None = None

    @property
    def documents(self) -> list[tuple[int, int, int]]:
        """(sequence, start, stop) of every document."""
        starts = [[0, self.tokens.shape[1]]] * len(self.tokens)
        if self.positions is not None:
            starts = STARTS
        return [(row, a, b) for row, cuts in enumerate(starts) for a, b in pairwise(cuts)]


def make_case(seed: int = 0, packed: bool = False, **changes: Any) -> BlockCase:
    """Make a random case; ``changes`` go to config or case."""
    torch.manual_seed(seed)
    fields = {f.name for f in dataclasses.fields(BlockConfig)}
    config = dataclasses.replace(CONFIG, **{k: v for k, v in changes.items() if k in fields})
    vocab = config.vocab_size
    ids = torch.randperm(vocab)[: config.draft_vocab_size].sort().values
    embedding, output = torch.randn(vocab, HIDDEN), torch.randn(vocab, HIDDEN) / 3
    weights = random_weights(ReferenceBlocks(config, embedding, output, ids))
    mask = torch.rand(BATCH, LENGTH) < 0.7
    mask[0, :5] = False
    positions = None
    if packed:
        positions = torch.stack(
            [torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)]) for cuts in STARTS]
        )
    return BlockCase(
        config=config,
        weights=weights,
        vocab_ids=ids,
        embedding=embedding,
        output_weight=output,
        aux=torch.randn(BATCH, LENGTH, config.num_aux * HIDDEN),
        final_hidden=torch.randn(BATCH, LENGTH, HIDDEN),
        tokens=torch.randint(vocab, (BATCH, LENGTH)),
        loss_mask=mask.float(),
        positions=positions,
        **{k: v for k, v in changes.items() if k not in fields},
    )


@torch.no_grad()
def random_weights(reference: ReferenceBlocks) -> dict[str, Tensor]:
    """Give the oracle random weights, and return them."""
    for parameter in reference.parameters():
        parameter.normal_(0.0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return {name: p.detach().clone() for name, p in reference.named_parameters()}


def reference_of(case: BlockCase) -> ReferenceBlocks:
    """The oracle with the case's weights, in double precision."""
    reference = ReferenceBlocks(
        case.config, case.embedding.double(), case.output_weight.double(), case.vocab_ids
    )
    reference.load_state_dict(case.weights)
    return reference.double()


def block_options(case: BlockCase) -> Any:
    """The package's options of the case's draft and training."""
    from megatron_eagle.config import EagleConfig

    config = case.config
    special = {}
    if config.next_token:
        special = {"markov_head": config.markov, "markov_rank": config.rank}
        special |= {"confidence_head": config.confidence}
        if config.confidence:
            special["confidence_weight"] = config.confidence_weight
    compressed = config.draft_vocab_size < config.vocab_size
    return EagleConfig.of(
        algorithm="dspark" if config.next_token else "dflash",
        draft_vocab_size=config.draft_vocab_size if compressed else None,
        num_layers=config.num_layers,
        block_size=config.block_size,
        mask_token=config.mask_token,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        position_weights="d-pace" if config.decay is None else "decay",
        position_decay=config.decay,
        ce_weight=config.ce,
        kl_weight=config.kl,
        l1_weight=config.l1,
        accuracy_target="data" if config.counts_data else None,
        anchors=case.anchors,
        logits_budget_mib=case.logits_budget_mib,
        loss_chunk_mib=case.loss_chunk_mib,
        **special,
    )


def shape_of(config: BlockConfig) -> BlockShape:
    return BlockShape(config.block_size, 0 if config.next_token else 1)


def micro_batch(
    case: BlockCase, tokens: Tensor, mask: Tensor, positions: Tensor | None, **layout: Any
) -> BlockBatch:
    """A micro-batch drafted as the case says."""
    return BlockBatch.build(
        tokens, mask, range(len(tokens)), shape_of(case.config), anchors=case.anchors, seed=11,
        positions=positions, window=case.window, **layout,
    )  # fmt: skip


def build_batch(case: BlockCase, groups: Any = None) -> BlockBatch:
    """The case's micro-batch on this rank; without ``groups`` on a single one."""
    tp, cp, rank = (1, 1, 0) if groups is None else (groups.tp.size(), case.cp, groups.cp.rank())
    parts = tp if case.sequence_parallel else 1
    return micro_batch(
        case, case.tokens, case.loss_mask, case.positions,
        multiple=parts * (2 * cp if cp > 1 else 1), anchor_multiple=parts, context=(rank, cp),
    )  # fmt: skip


def build_model(case: BlockCase) -> Any:
    """EagleGPTModel on this rank, with this rank's shards of the case's weights, float32."""
    from megatron.core.transformer import TransformerConfig

    from megatron_eagle.draft.build import build_draft
    from megatron_eagle.draft.layer_config import Rotary
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.model import EagleGPTModel

    groups, sizes = draft_groups(), case.config
    config = TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.intermediate_size,
        num_attention_heads=sizes.num_heads,
        num_query_groups=sizes.num_kv_heads,
        kv_channels=sizes.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.rms_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        sequence_parallel=case.sequence_parallel,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
    )
    given = SimpleNamespace(
        config=SimpleNamespace(
            vocab_size=sizes.vocab_size, rope_scaling=None, qk_rope_head_dim=0,
            head_dim=sizes.head_dim, rope_theta=sizes.rope_theta,
        ),
        embedding=case.embedding, output_weight=case.output_weight, aux=case.aux,
        final_hidden=case.final_hidden,
    )  # fmt: skip
    base: Any = GivenBase(config, given, groups.tp)  # type: ignore[arg-type]
    options = block_options(case)
    draft = build_draft(
        spec=options.spec,
        num_aux=sizes.num_aux,
        base_config=config,
        backend=local_backend(),
        vocab_ids=case.vocab_ids,
        vocab_size=sizes.vocab_size,
        base_head=lambda: base.output_weight,
        base_head_rows=base.output_weight.shape[0],
        rotary=Rotary(base.rotary),
        metadata=encode_metadata({}),
        pg_collection=groups,
        device=base.output_weight.device,
    )
    load_weights(draft, case)
    return EagleGPTModel(base, draft, options)


def parameter_names(case: BlockCase) -> dict[str, tuple[list[str], str]]:
    """Package parameter -> (oracle's parameters, how they are joined and sharded)."""
    config = case.config
    names = {
        "fc.weight": (["fc.weight"], "whole" if case.sequence_parallel else "rows"),
        "hidden_norm.weight": (["hidden_norm.weight"], "whole"),
        "norm.weight": (["norm.weight"], "whole"),
    }
    for i in range(config.num_layers):
        p = f"layers.{i}."
        names |= {
            f"{p}input_layernorm.weight": ([f"{p}input_layernorm.weight"], "whole"),
            f"{p}self_attention.linear_qkv.weight": (
                [f"{p}self_attn.{x}_proj.weight" for x in "qkv"], "qkv"),
            f"{p}self_attention.linear_proj.weight": ([f"{p}self_attn.o_proj.weight"], "columns"),
            f"{p}self_attention.q_layernorm.weight": ([f"{p}self_attn.q_norm.weight"], "whole"),
            f"{p}self_attention.k_layernorm.weight": ([f"{p}self_attn.k_norm.weight"], "whole"),
            f"{p}pre_mlp_layernorm.weight": ([f"{p}post_attention_layernorm.weight"], "whole"),
            f"{p}mlp.linear_fc1.weight": (
                [f"{p}mlp.gate_proj.weight", f"{p}mlp.up_proj.weight"], "gated"),
            f"{p}mlp.linear_fc2.weight": ([f"{p}mlp.down_proj.weight"], "columns"),
        }  # fmt: skip
    if config.markov is not None:
        names["markov.w1.weight"] = (["markov_head.markov_w1.weight"], "base")
        names["markov.w2.weight"] = (["markov_head.markov_w2.weight"], "vocab")
        projection = {"gated": "gate_proj", "rnn": "joint_proj"}.get(config.markov)
        for part in ("weight", "bias") if projection else ():
            names[f"markov.projection.{part}"] = ([f"markov_head.{projection}.{part}"], "whole")
    for part in ("weight", "bias") if config.confidence else ():
        names[f"confidence.{part}"] = ([f"confidence_head.proj.{part}"], "whole")
    return names


def own_part(
    parts: list[Tensor],
    kind: str,
    case: BlockCase,
    tp: tuple[int, int],
    vocab: tuple[int, int],
    rows: int,
) -> tuple[Tensor, int | None]:
    """This rank's part, of ``rows`` rows, of the oracle's tensors, and how many are real."""
    if kind in ("base", "vocab"):
        start, count = (tp[0] * rows, rows) if kind == "base" else vocab
        part = parts[0][start : start + count]
        return part, len(part)
    return local_part(parts, kind, case, *tp), None  # type: ignore[arg-type]


@torch.no_grad()
def load_weights(draft: Any, case: BlockCase) -> None:
    """Copy this rank's shards of the case's weights into ``draft``."""
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    names = parameter_names(case)
    assert set(trained) == set(names), set(trained) ^ set(names)
    tp = draft.tp_group.rank(), draft.tp_group.size()
    for name, (sources, kind) in names.items():
        parts = [case.weights[source] for source in sources]
        vocab = draft.shard.start, draft.shard.rows
        part, rows = own_part(parts, kind, case, tp, vocab, trained[name].shape[0])
        trained[name].zero_()
        trained[name][: rows if rows is not None else len(part)] = part


def run_cases(rank: int, world: int, cases: list[BlockCase]) -> list[dict[str, Any]]:
    """Return the results of several cases of one layout on this rank."""
    groups = megatron_parallel(tp=world // cases[0].cp, cp=cases[0].cp)
    return [_run(case, groups) for case in cases]


def _run(case: BlockCase, groups: Any) -> dict[str, Any]:
    """Loss, sums and gradients of this rank's shards, reduced as Megatron reduces them."""
    from megatron_eagle.objective.block_metrics import BlockSums, divisor

    model = build_model(case)
    loss, packed = model(build_batch(case, groups))
    total, packed = loss.detach().clone(), packed.detach()
    for tensor in (total, packed):
        torch.distributed.all_reduce(tensor, group=groups.cp)
    sums = BlockSums.unpack(packed)
    by = divisor(sums, model.options.blocks())
    (loss / by).backward()
    for name, parameter in model.draft.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.distributed.all_reduce(parameter.grad, group=groups.cp)
        shared = getattr(parameter, "sequence_parallel", False) and case.sequence_parallel
        # As Megatron's finalize_model_grads does, by the model's own configuration.
        of_heads = model.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if shared or of_heads:
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)
    shard = model.draft.shard
    return {
        "loss": float(total / by),
        "sums": sums,
        "grads": {n: p.grad for n, p in model.draft.named_parameters() if p.requires_grad},
        "vocab": (shard.start, shard.rows),
        "tp": (groups.tp.rank(), groups.tp.size()),
    }


def drawn_anchors(case: BlockCase, sequence: int, supervised: list[bool]) -> list[int]:
    """Anchors of one sequence, whose ``supervised`` tokens leave out the first of each document."""
    runs = [judged_slots(supervised, i - 1, len(supervised)) for i in range(len(supervised))]
    return draw_anchors(torch.tensor(runs), case.anchors, 11, sequence).tolist()


def no_sums(steps: int) -> dict[str, Any]:
    """The oracle's sums of no block."""
    return {
        "loss_sum": torch.zeros(()).double(), "weight": 0.0, "blocks": 0, "expected": 0.0,
        "confidence": 0.0,
        **{name: torch.zeros(steps).double() for name in ("loss", "rows", "hits", "prefix_hits")},
    }  # fmt: skip


def add_block(sums: dict[str, Any], judged: dict[str, Any]) -> None:
    """Add what the oracle says of one block."""
    weights, hits, count = judged["weights"], judged["hits"].double(), len(judged["hits"])
    sums["loss_sum"] = sums["loss_sum"] + (weights * judged["total"]).sum()
    sums["weight"] += float(weights.sum())
    sums["blocks"] += 1
    sums["expected"] += float(judged["alpha"].cumprod(0).sum())
    sums["confidence"] += float((weights * judged["bce"]).sum())
    sums["loss"][:count] += judged["loss"].detach()
    sums["rows"][:count] += 1
    sums["hits"][:count] += hits
    sums["prefix_hits"][:count] += hits.cumprod(0)


def expectation(case: BlockCase) -> tuple[dict[str, Any], ReferenceBlocks]:
    """The oracle's sums over all blocks, its loss not yet divided, and the oracle."""
    reference, steps = reference_of(case), case.config.drafts
    sums = no_sums(steps)
    for row, start, stop in case.documents:
        mask = case.loss_mask[row] > 0
        supervised = [i > start and bool(mask[i - 1]) for i in range(start, stop)]
        whole = [
            i not in {a for r, a, _ in case.documents if r == row} and i > 0 and bool(mask[i - 1])
            for i in range(case.tokens.shape[1])
        ]
        for anchor in drawn_anchors(case, row, whole):
            if not start <= anchor < stop:
                continue
            count = judged_slots(supervised, anchor - start, steps)
            judged = reference.judge(
                case.aux[row, start:stop].double(), case.final_hidden[row, start:stop].double(),
                case.tokens[row, start:stop], anchor - start, count,
            )  # fmt: skip
            add_block(sums, judged)
    assert sums["blocks"] > 3
    return sums, reference


def divisor_of(case: BlockCase, sums: dict[str, Any]) -> float:
    """What the oracle's loss is divided by."""
    return sums["blocks"] if case.config.decay is None else sums["weight"]


def compare(case: BlockCase, results: list[dict[str, Any]], tolerance: float = TOLERANCE) -> None:
    """Compare loss, sums and every gradient on every rank with the oracle's."""
    sums, reference = expectation(case)
    loss = sums["loss_sum"] / divisor_of(case, sums)
    loss.backward()
    for result in results:
        close(torch.tensor(result["loss"]), loss.detach(), "loss", tolerance)
        compare_sums(result["sums"], sums, case, tolerance)
    compare_gradients(case, reference, results, tolerance)


def compare_gradients(
    case: BlockCase, reference: ReferenceBlocks, results: list[dict[str, Any]], tolerance: float
) -> None:
    """Compare every gradient on every rank with the oracle's, which has gone backward."""
    grads: Any = {name: p.grad for name, p in reference.named_parameters()}
    for rank, result in enumerate(results):
        for name, (sources, kind) in parameter_names(case).items():
            parts = [grads[source] for source in sources]
            found = result["grads"][name]
            layout = result["tp"], result["vocab"], found.shape[0]
            whole, rows = own_part(parts, kind, case, *layout)
            if rows is not None:
                assert not found[rows:].any(), f"{name}: padding rows must get no gradient"
                found = found[:rows]
                if not rows:
                    continue
            close(found, whole, f"gradient of {name} on rank {rank}", tolerance)


def compare_sums(sums: Any, expected: dict[str, Any], case: BlockCase, tolerance: float) -> None:
    """Compare the metric sums with the oracle's."""
    close(sums.loss, expected["loss"], "loss per slot", tolerance)
    for name in ("rows", "hits", "prefix_hits"):
        assert getattr(sums, name).tolist() == expected[name].tolist(), name
    assert int(sums.blocks) == expected["blocks"]
    names = ["weight", "confidence"]
    names += ["expected"] if case.config.l1 or case.config.confidence else []
    for name in names:
        value = torch.tensor(float(getattr(sums, name)))
        close(value, torch.tensor(expected[name]), name, 10 * tolerance)
