"""EagleConfig: every option of a draft and of its training, the source of the ``--eagle-*`` flags.

One dataclass is the single source: a field's type and metadata become its command-line flag, its
help text and its checks. Nothing else in the package declares an option.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.config.checks import ALGORITHMS, LOSSES, check_against_base, check_options
from megatron_eagle.config.widths import (
    ATTENTIONS,
    MOE_BALANCE,
    MOE_TOPK,
    check_attention,
    expert_config,
    layer_widths,
)

REGRESSION_WEIGHT = 10.0
LK_DECAY = 3.0


def _option(default: Any, help_text: str, **flag: Any) -> Any:
    """A dataclass field whose ``flag`` entries go to ``ArgumentParser.add_argument``."""
    return field(default=default, metadata={"help": help_text, "flag": flag})


@dataclass(frozen=True)
class EagleConfig:
    """Options of an EAGLE draft and of its training.

    Raises ``ValueError`` on construction, naming the flag and its value, when an option makes no
    sense by itself; :meth:`check_against_base` does so for what depends on the base.
    """

    base_checkpoint: str | None = _option(
        None, "Megatron checkpoint of the frozen base (from tools/import_base.py)", metavar="DIR"
    )
    algorithm: str = _option(
        "eagle3",
        "eagle1 (also EAGLE-2: reads the base's last hidden, shares its output layer, regresses "
        "the hidden), eagle3, eagle3.1 (a norm per captured layer, and the normed output is fed "
        "back) or p-eagle (all steps in one pass, later ones from a learned mask hidden)",
        choices=ALGORITHMS,
    )
    norm_before_fc: bool = _option(
        False, "EAGLE-3: one RMSNorm over the concatenated captured layers, in front of fc"
    )
    norm_before_residual: bool = _option(
        False, "EAGLE-3: the first layer's residual is the normed hidden, not the plain one"
    )
    mask_token: int | None = _option(
        None,
        "P-EAGLE: id of the base's token whose embedding stands for tokens not drafted yet; one "
        "that texts do not use",
        type=int,
    )
    regression_weight: float | None = _option(
        None,
        "EAGLE-1: weight of the smooth-L1 loss on the hidden beside the cross-entropy (default: "
        f"{REGRESSION_WEIGHT:g}, as EAGLE's own 1 : 0.1)",
        type=float,
    )
    ttt_steps: int = _option(3, "K: test-time-training steps the draft is unrolled for", type=int)
    aux_layers: tuple[int, ...] | None = _option(
        None,
        "0-based base layers whose outputs are captured, ascending "
        "(default: 1, n//2 - 1 and n - 4 of n layers)",
        type=int,
        nargs="+",
        metavar="LAYER",
    )
    num_layers: int = _option(1, "transformer layers of the draft", type=int)
    attention: str = _option(
        "gqa",
        "gqa (Llama-type layers, which every server reads) or mla (multi-latent, for a base that "
        "has it: its sizes and rotary embedding are the base's, where flags do not say otherwise)",
        choices=ATTENTIONS,
    )
    ffn_hidden_size: int | None = _option(
        None, "ffn width of the draft's layers (default: the base's)", type=int
    )
    num_attention_heads: int | None = _option(
        None, "attention heads of the draft's layers (default: the base's)", type=int
    )
    num_query_groups: int | None = _option(
        None, "key/value heads of the draft's layers (default: the base's)", type=int
    )
    kv_channels: int | None = _option(
        None, "size of an attention head of the draft's layers (default: the base's)", type=int
    )
    q_lora_rank: int | None = _option(
        None, "MLA draft: rank of the queries, 0 for whole ones (default: the base's)", type=int
    )
    kv_lora_rank: int | None = _option(
        None, "MLA draft: rank of keys and values (default: the base's)", type=int
    )
    qk_head_dim: int | None = _option(
        None, "MLA draft: channels of a head without position (default: the base's)", type=int
    )
    qk_pos_emb_head_dim: int | None = _option(
        None, "MLA draft: rotary channels of a head (default: the base's)", type=int
    )
    v_head_dim: int | None = _option(
        None, "MLA draft: channels of a head's values (default: the base's)", type=int
    )
    num_experts: int | None = _option(
        None, "experts of each of the draft's layers (default: dense layers)", type=int
    )
    moe_router_topk: int | None = _option(
        None, f"experts of a token in a MoE draft (default: {MOE_TOPK})", type=int
    )
    moe_ffn_hidden_size: int | None = _option(
        None, "ffn width of a MoE draft's experts (default: that of a dense layer)", type=int
    )
    moe_aux_loss_coeff: float | None = _option(
        None,
        "weight of a MoE draft's balance loss, per supervised row of step 0 (default: "
        f"{MOE_BALANCE:g})",
        type=float,
    )
    draft_vocab_size: int | None = _option(
        None,
        "D: size of the draft's vocabulary, its ids chosen by how often training supervises them "
        "(default: the base's whole vocabulary)",
        type=int,
    )
    vocab_map: str | None = _option(
        None,
        "safetensors file whose int64 tensor 'vocab_ids' lists the draft's token ids, ascending, "
        "or whose 'd2t' holds them as offsets; used instead of counting",
        metavar="FILE",
    )
    warm_start: str | None = _option(
        None,
        "start from this draft's weights and vocabulary: a Hugging Face directory (EAGLE-3 of "
        "SafeAILab, SpecForge, ModelOpt, speculators, vLLM layouts) or a draft checkpoint; the "
        "optimizer starts afresh",
        metavar="DIR",
    )
    init_from_base: bool = _option(
        False,
        "start from the base's last layers instead of random ones: attention, MLP, norms and head "
        "are copied, fc passes the last captured layer on; the draft's widths must be the base's",
    )
    loss: str = _option(
        "kl",
        "kl (its cross-entropy is reported), ce (of the base's best draft token), reverse-kl, tv "
        "(1 - acceptance), lk-alpha (-log acceptance) or lk-lambda (kl and tv mixed by acceptance)",
        choices=LOSSES,
    )
    lk_decay: float | None = _option(
        None,
        "lk-lambda: kl weighs exp(-lk_decay * acceptance) in a row, tv the rest (default: "
        f"{LK_DECAY:g})",
        type=float,
    )
    step_decay: float = _option(0.8, "step t of the unroll weighs step_decay**t", type=float)
    detach_steps: bool = _option(
        False, "do not back-propagate through the hidden state fed from step to step"
    )
    mask_out_of_vocab: bool = _option(
        False, "leave out rows whose base argmax lies outside the draft vocabulary"
    )
    train_data: str | None = _option(
        None,
        "JSONL of prompt_ids and answer_ids (tools/regenerate.py), answers supervised, or the "
        "prefix of a data set with a loss mask (tools/prepare_data.py); without it Megatron's "
        "--data-path is used and every token is supervised",
        metavar="FILE_OR_PREFIX",
    )
    offline_features: str | None = _option(
        None,
        "train from the hidden states of tools/extract_features.py, which hold their documents; no "
        "layer of the base is loaded",
        metavar="DIR",
    )
    pack: bool = _option(
        False,
        "fill every sequence with as many whole documents as fit; attention, positions and TTT "
        "steps stay inside a document",
    )
    logits_budget_mib: int = _option(
        256,
        "with tensor parallelism, draft softmaxes of a micro-batch are kept for backward up to "
        "this many MiB per rank; above it each chunk of rows is reduced by a collective of its own",
        type=int,
    )
    teacher_memory: int = _option(
        1024,
        "with tensor parallelism, the base's softmaxes of a micro-batch are kept for backward up "
        "to this many MiB per rank; above it as with --eagle-logits-budget-mib",
        type=int,
        metavar="MIB",
    )
    loss_chunk_mib: int | None = _option(
        None,
        "MiB of logits that exist at a time, counted in fp32: more rows in a matrix product are "
        "faster (default: 2048 on a GPU, 32 or 56 on a CPU)",
        type=int,
    )
    log_file: str | None = _option(
        None, "append a line of metrics, means, per --log-interval to this JSONL", metavar="FILE"
    )
    eval_prompts: str | None = _option(
        None,
        "JSONL of prompts, as tools/eval_acceptance.py reads them: the draft's accepted length on "
        "them is measured while training and logged, and the best draft kept in SAVE/best",
        metavar="FILE",
    )
    eval_interval: int = _option(
        1000, "iterations between these measurements; the last is always measured", type=int
    )
    eval_new_tokens: int = _option(
        64, "tokens that each of --eagle-eval-prompts is continued by", type=int
    )
    eval_draft_tokens: int | None = _option(
        None, "tokens drafted per verification there (default: --eagle-ttt-steps)", type=int
    )
    compile: bool = _option(
        False, "torch.compile the draft's collective-free regions; falls back to eager if it fails"
    )
    nvtx: bool = _option(False, "mark teacher, unroll, loss and step with NVTX ranges")

    def __post_init__(self) -> None:
        if self.aux_layers is not None:
            object.__setattr__(self, "aux_layers", tuple(int(i) for i in self.aux_layers))
        check_options(self)
        check_attention(self)

    @property
    def hidden_loss_weight(self) -> float:
        """The weight of the smooth-L1 loss on the hidden: 0 for all but EAGLE-1."""
        if self.algorithm != "eagle1":
            return 0.0
        return REGRESSION_WEIGHT if self.regression_weight is None else self.regression_weight

    @property
    def acceptance_decay(self) -> float:
        """How fast the weight of kl falls with the acceptance, for ``lk-lambda``."""
        return LK_DECAY if self.lk_decay is None else self.lk_decay

    @property
    def reads_documents(self) -> bool:
        """Whether training reads documents, rather than Megatron's stream of tokens."""
        return self.train_data is not None or self.offline_features is not None

    def captured_layers(self, base_layers: int) -> tuple[int, ...]:
        """The captured layers of a base of ``base_layers`` layers: 0-based, outputs, ascending;
        none for EAGLE-1, which reads the final hidden."""
        if self.algorithm == "eagle1":
            return ()
        if self.aux_layers is not None:
            return self.aux_layers
        if base_layers < 7:
            raise ValueError(
                f"--eagle-aux-layers must be given for a base of {base_layers} layers: "
                "the defaults 1, n//2 - 1 and n - 4 need at least 7"
            )
        return (1, base_layers // 2 - 1, base_layers - 4)

    def layer_widths(self, base_args: Mapping[str, Any]) -> dict[str, int]:
        """The widths of the draft's layers beside a base with these Megatron arguments, under
        Megatron's names; of its kind of attention alone, ``q_lora_rank`` 0 for none. Raises
        ``ValueError`` if they do not go together."""
        return layer_widths(self, base_args)

    def expert_config(self) -> dict[str, Any]:
        """The experts of the draft's layers under the names of Megatron's TransformerConfig;
        nothing for dense layers."""
        return expert_config(self)

    def check_against_base(self, base_layers: int, vocab_size: int, seq_length: int) -> None:
        """Raise ``ValueError`` for options that a base of these dimensions cannot honour."""
        check_against_base(self, base_layers, vocab_size, seq_length)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> EagleConfig:
        """Build from parsed flags, as
        :func:`~megatron_eagle.config.flags.add_eagle_flags` declared them."""
        return cls(**{f.name: getattr(args, f"eagle_{f.name}") for f in dataclasses.fields(cls)})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EagleConfig:
        """Build from the JSON of a checkpoint; an unknown key raises ``ValueError``."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown draft options in the checkpoint: {sorted(unknown)}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The options as JSON-serialisable values."""
        return dataclasses.asdict(self)
