"""TrainOptions: how a draft is trained. A checkpoint records them, and nobody reads them back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_eagle.config.option import check_ranges, option
from megatron_eagle.errors import UserError

LOSSES = ("kl", "ce", "reverse-kl", "tv", "lk-alpha", "lk-lambda")
REGRESSION_WEIGHT = 10.0
LK_DECAY = 3.0
MOE_BALANCE = 0.01
ANCHORS = 512
POSITION_WEIGHTS = ("decay", "d-pace")
POSITION_DECAY = 4.0
ACCURACY_TARGETS = ("base", "data")


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run.

    Raises :class:`UserError` on construction for a value or a pair that makes no sense by itself.
    """

    base_checkpoint: str | None = option(
        None,
        "Megatron checkpoint of the frozen base, the target (verifier) model: one that "
        "Megatron-LM or Megatron-Bridge saved as torch_dist, or that megatron-eagle import-base "
        "wrote",
        metavar="DIR",
    )
    base_description: str | None = option(
        None,
        "description of the base that is believed instead of what its checkpoint says "
        "(megatron-eagle describe-base writes one)",
        metavar="FILE",
    )
    ttt_steps: int = option(
        3, "K: test-time-training steps the draft is unrolled for", type=int, least=1, most=1000
    )
    vocab_map: str | None = option(
        None,
        "safetensors file whose int64 tensor 'vocab_ids' lists the draft's token ids, ascending, "
        "or whose 'd2t' holds them as offsets; used instead of counting",
        metavar="FILE",
    )
    warm_start: str | None = option(
        None,
        "start from this draft's weights and vocabulary: a Hugging Face directory (EAGLE-1, 3 or "
        "3.1 in the format of SafeAILab, SpecForge, ModelOpt, speculators or vLLM; DFlash or "
        "DSpark; of mtp the base's own directory) or a draft checkpoint; the optimizer starts "
        "afresh",
        metavar="DIR",
    )
    init_from_base: bool = option(
        False,
        "start from the base's last layers instead of random ones: attention, MLP, norms and head "
        "are copied, fc passes the last aux layer on; the draft's widths must be the base's",
    )
    loss: str = option(
        "kl",
        "kl (logged as the equivalent soft cross-entropy), ce (of the base's best draft token), "
        "reverse-kl, tv (1 - acceptance), lk-alpha (-log acceptance) or lk-lambda (kl and tv mixed "
        "by acceptance)",
        choices=LOSSES,
    )
    lk_decay: float | None = option(
        None,
        "lk-lambda: kl weighs exp(-lk_decay * acceptance) at a token, tv the rest (default: "
        f"{LK_DECAY:g})",
        type=float,
        least=0,
    )
    step_decay: float = option(0.8, "step t of the unroll weighs step_decay**t", type=float)
    regression_weight: float | None = option(
        None,
        "EAGLE-1: weight of the smooth-L1 loss on the hidden state beside the cross-entropy "
        f"(default: {REGRESSION_WEIGHT:g}, as EAGLE's own 1 : 0.1)",
        type=float,
        least=0,
    )
    moe_aux_loss_coeff: float | None = option(
        None,
        "weight of a MoE draft's balance loss, per supervised token of step 0 (default: "
        f"{MOE_BALANCE:g})",
        type=float,
        least=0,
    )
    detach_steps: bool = option(
        False, "do not back-propagate through the hidden state fed from step to step"
    )
    mask_out_of_vocab: bool = option(
        False, "leave out tokens where the base's argmax lies outside the draft vocabulary"
    )
    anchors: int | None = option(
        None,
        "dflash, dspark: blocks that each sequence is trained on, their anchors drawn anew for "
        f"every sample (default: {ANCHORS})",
        type=int,
        least=1,
    )
    position_weights: str | None = option(
        None,
        "dflash, dspark: weights of a block's slots: decay (exp(-t / position_decay) for the t-th "
        "judged slot) or d-pace (by how likely the slots before it are right, arXiv 2605.18810) "
        "(default: decay)",
        choices=POSITION_WEIGHTS,
    )
    position_decay: float | None = option(
        None,
        "dflash, dspark: how slowly the weights of a block's slots decay (default: "
        f"{POSITION_DECAY:g})",
        type=float,
    )
    ce_weight: float | None = option(
        None,
        "dflash, dspark: weight of the cross-entropy with the data's tokens (default: dflash 1, "
        "dspark 0.1)",
        type=float,
        least=0,
    )
    kl_weight: float | None = option(
        None,
        "dflash, dspark: weight of the cross-entropy with the base's distribution (default: 0)",
        type=float,
        least=0,
    )
    l1_weight: float | None = option(
        None,
        "dflash, dspark: weight of the L1 distance from the base's distribution (default: dflash "
        "0, dspark 0.9)",
        type=float,
        least=0,
    )
    accuracy_target: str | None = option(
        None,
        "dflash, dspark: what the logged accuracy and simulated accepted length compare a drafted "
        "token with: base (its most likely token) or data (the data's token, where the "
        "cross-entropy with it is the only loss: the base's output layer is then left out) "
        "(default: base)",
        choices=ACCURACY_TARGETS,
    )
    confidence_weight: float | None = option(
        None, "dspark: weight of the confidence head's loss (default: 1)", type=float, least=0
    )
    train_data: str | None = option(
        None,
        "JSONL of prompt_ids and answer_ids (megatron-eagle regenerate), answers supervised, or "
        "the prefix of a data set with a loss mask (megatron-eagle prepare-data); without it "
        "Megatron's --data-path is used and every token is supervised",
        metavar="FILE_OR_PREFIX",
    )
    offline_features: str | None = option(
        None,
        "train from the hidden states that megatron-eagle extract-features wrote, which hold their "
        "documents; no layer of the base is loaded",
        metavar="DIR",
    )
    pack: bool = option(
        False,
        "fill every sequence with as many whole documents as fit; attention, positions and TTT "
        "steps stay inside a document",
    )
    logits_budget_mib: int = option(
        256,
        "with tensor parallelism, draft softmaxes of a micro-batch are kept for backward up to "
        "this many MiB per rank; above it each chunk of tokens is reduced by a collective of its "
        "own",
        type=int,
        least=0,
    )
    teacher_memory: int = option(
        1024,
        "with tensor parallelism, the base's softmaxes of a micro-batch are kept for backward up "
        "to this many MiB per rank; above it each chunk is reduced by a collective of its own",
        type=int,
        least=0,
        metavar="MIB",
    )
    loss_chunk_mib: int | None = option(
        None,
        "MiB of logits that exist at a time, counted in fp32: more tokens in a matrix product are "
        "faster (default: 2048 on a GPU, 32 or 56 on a CPU)",
        type=int,
        least=1,
    )
    log_file: str | None = option(
        None,
        "append one line of mean metrics to this JSONL every --log-interval iterations",
        metavar="FILE",
    )
    eval_prompts: str | None = option(
        None,
        "JSONL of prompts, as megatron-eagle eval reads them: the draft's accepted length on them "
        "is measured while training and logged, and the best draft kept in SAVE/best",
        metavar="FILE",
    )
    eval_interval: int = option(
        1000,
        "iterations between these measurements; the last is always measured",
        type=int,
        least=1,
    )
    eval_new_tokens: int = option(
        64, "tokens by which each of --eagle-eval-prompts is continued", type=int, least=1
    )
    eval_draft_tokens: int | None = option(
        None,
        "tokens drafted per verification in this evaluation (default: --eagle-ttt-steps)",
        type=int,
        least=1,
    )
    compile: bool = option(
        False, "torch.compile the draft's collective-free regions; falls back to eager if it fails"
    )
    kernels: str = option(
        "auto",
        "what runs the passes over logits and branch attention: Triton kernels on a GPU if Triton "
        "is installed, else eager functions (auto); Triton or an error; eager functions",
        choices=("auto", "triton", "eager"),
    )
    nvtx: bool = option(False, "mark base, teacher, unroll, loss and step with NVTX ranges")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0.0 < self.step_decay <= 1.0:
            raise UserError(f"<step_decay> must be in (0, 1], not {self.step_decay}")
        if self.lk_decay is not None and self.loss != "lk-lambda":
            raise UserError(f"<lk_decay> {self.lk_decay}: only <loss> lk-lambda has it")
        if self.pack and not self.reads_documents:
            raise UserError("<pack> needs <train_data>: <data_path> has no documents")
        if self.offline_features is not None and self.train_data is not None:
            raise UserError(
                "<train_data> and <offline_features>: features hold their own documents"
            )
        if self.init_from_base and self.warm_start is not None:
            raise UserError(f"<init_from_base>: <warm_start> {self.warm_start} starts otherwise")
        if self.position_decay is not None:
            if self.position_decay <= 0:
                raise UserError(f"<position_decay> must be above 0, not {self.position_decay}")
            if self.position_weights == "d-pace":
                raise UserError(
                    f"<position_decay> {self.position_decay}: <position_weights> d-pace has none"
                )
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        if self.eval_prompts is None:
            for name in ("eval_interval", "eval_new_tokens", "eval_draft_tokens"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UserError(f"<{name}> {getattr(self, name)} needs <eval_prompts>")
        elif self.offline_features is not None:
            raise UserError(
                "<eval_prompts>: with <offline_features> there is no base to decode with; measure "
                "the saved draft with megatron-eagle eval"
            )

    @property
    def acceptance_decay(self) -> float:
        """How fast the weight of kl falls with the acceptance, for ``lk-lambda``."""
        return LK_DECAY if self.lk_decay is None else self.lk_decay

    @property
    def reads_documents(self) -> bool:
        """Whether training reads documents, rather than Megatron's stream of tokens."""
        return self.train_data is not None or self.offline_features is not None

    def to_mapping(self) -> dict[str, Any]:
        """Return all options as JSON-serialisable values."""
        return asdict(self)
