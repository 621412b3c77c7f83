"""What makes options impossible by themselves: ``ValueError`` with the flag and its value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_eagle.config import EagleConfig

ALGORITHMS = ("eagle1", "eagle3", "eagle3.1", "p-eagle")
LOSSES = ("kl", "ce", "reverse-kl", "tv", "lk-alpha", "lk-lambda")
EXPERT_OPTIONS = ("moe_router_topk", "moe_ffn_hidden_size", "moe_aux_loss_coeff")
EVALUATION = ("eval_interval", "eval_new_tokens", "eval_draft_tokens")
_NOT_EAGLE1 = (
    "aux_layers",
    "norm_before_fc",
    "norm_before_residual",
    "draft_vocab_size",
    "vocab_map",
    "mask_out_of_vocab",
)


def check_options(options: EagleConfig) -> None:
    """Raise ``ValueError`` for the first impossible option or combination."""
    least = {"ttt_steps": 1, "num_layers": 1, "logits_budget_mib": 0, "teacher_memory": 0}
    least |= {"eval_interval": 1, "eval_new_tokens": 1}
    for name, least_value in least.items():
        if getattr(options, name) < least_value:
            raise ValueError(
                f"{flag_name(name)} must be at least {least_value}, not {getattr(options, name)}"
            )
    at_least_one = (
        "draft_vocab_size", "num_experts", "eval_draft_tokens", "loss_chunk_mib",
        *EXPERT_OPTIONS[:2],
    )  # fmt: skip
    for name in at_least_one:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_name(name)} must be at least 1, not {value}")
    if not 0.0 < options.step_decay <= 1.0:
        raise ValueError(f"--eagle-step-decay must be in (0, 1], not {options.step_decay}")
    if options.pack and not options.reads_documents:
        raise ValueError("--eagle-pack needs --eagle-train-data: --data-path has no documents")
    if options.offline_features is not None and options.train_data is not None:
        raise ValueError(
            "--eagle-train-data and --eagle-offline-features: features hold their own documents"
        )
    if options.offline_features is not None and options.algorithm == "eagle1":
        raise ValueError("--eagle-offline-features: --eagle-algorithm eagle1 captures no layers")
    if options.init_from_base:
        _check_init(options)
    if options.aux_layers is not None:
        _check_aux_layers(options.aux_layers)
    _check_algorithm(options)
    _check_evaluation(options)
    _check_loss(options)
    _check_experts(options)


def _check_init(options: EagleConfig) -> None:
    for name in ("warm_start", "num_experts"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--eagle-init-from-base: {shown_flag(name, getattr(options, name))} starts "
                "otherwise"
            )
    if options.algorithm == "eagle1":
        raise ValueError(
            "--eagle-init-from-base: --eagle-algorithm eagle1 reads the base's final hidden, which "
            "no layer of the base reads"
        )


def check_against_base(
    options: EagleConfig, base_layers: int, vocab_size: int, seq_length: int
) -> None:
    """See :meth:`~megatron_eagle.config.EagleConfig.check_against_base`."""
    for layer in options.captured_layers(base_layers):
        if layer >= base_layers:
            raise ValueError(
                f"--eagle-aux-layers {layer} is out of range: "
                f"the base has layers 0 to {base_layers - 1}"
            )
    if options.draft_vocab_size is not None and options.draft_vocab_size > vocab_size:
        raise ValueError(
            f"--eagle-draft-vocab-size {options.draft_vocab_size} exceeds "
            f"the base's vocabulary of {vocab_size}"
        )
    if options.mask_token is not None and options.mask_token >= vocab_size:
        raise ValueError(
            f"--eagle-mask-token {options.mask_token} is outside the base's 0 to {vocab_size - 1}"
        )
    if seq_length < options.ttt_steps + 2:
        raise ValueError(
            f"--seq-length {seq_length} is too short: --eagle-ttt-steps {options.ttt_steps} "
            f"needs at least {options.ttt_steps + 2} tokens"
        )


def flag_name(field_name: str) -> str:
    """``ttt_steps`` -> ``--eagle-ttt-steps``."""
    return "--eagle-" + field_name.replace("_", "-")


def _check_experts(options: EagleConfig) -> None:
    if options.num_experts is None:
        for name in EXPERT_OPTIONS:
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{shown_flag(name, getattr(options, name))}: only a MoE draft has it "
                    "(--eagle-num-experts)"
                )
        return
    topk = options.expert_config()["moe_router_topk"]
    if topk > options.num_experts:
        raise ValueError(
            f"--eagle-moe-router-topk: {topk} experts of a token, but --eagle-num-experts "
            f"{options.num_experts}"
        )
    if options.moe_aux_loss_coeff is not None and options.moe_aux_loss_coeff < 0:
        raise ValueError(
            f"--eagle-moe-aux-loss-coeff must not be negative: {options.moe_aux_loss_coeff}"
        )


def _check_loss(options: EagleConfig) -> None:
    if options.loss not in LOSSES:
        raise ValueError(f"--eagle-loss must be one of {', '.join(LOSSES)}, not {options.loss}")
    if options.lk_decay is not None and options.loss != "lk-lambda":
        raise ValueError(f"--eagle-lk-decay {options.lk_decay}: only --eagle-loss lk-lambda has it")
    if options.lk_decay is not None and options.lk_decay < 0:
        raise ValueError(f"--eagle-lk-decay must not be negative: {options.lk_decay}")


def _check_algorithm(options: EagleConfig) -> None:
    """What one algorithm has and another has not: an option without effect is a mistake."""
    if options.algorithm not in ALGORITHMS:
        raise ValueError(
            f"--eagle-algorithm must be one of {', '.join(ALGORITHMS)}, not {options.algorithm}"
        )
    if options.algorithm == "eagle1":
        for name in _NOT_EAGLE1:
            value = getattr(options, name)
            if value not in (None, False):
                raise ValueError(
                    f"{shown_flag(name, value)}: --eagle-algorithm eagle1 reads the base's last "
                    "hidden alone and shares its whole output layer"
                )
    elif options.regression_weight is not None:
        raise ValueError(
            f"--eagle-regression-weight {options.regression_weight}: only --eagle-algorithm "
            "eagle1 regresses the hidden"
        )
    if options.regression_weight is not None and options.regression_weight < 0:
        raise ValueError(
            f"--eagle-regression-weight must not be negative: {options.regression_weight}"
        )
    _check_parallel(options)
    if options.algorithm == "eagle3.1" and options.norm_before_fc:
        raise ValueError(
            "--eagle-norm-before-fc: --eagle-algorithm eagle3.1 has a norm per captured layer "
            "there already"
        )


def _check_evaluation(options: EagleConfig) -> None:
    if options.eval_prompts is None:
        defaults = type(options)
        for name in EVALUATION:
            if getattr(options, name) != getattr(defaults, name):
                given = shown_flag(name, getattr(options, name))
                raise ValueError(f"{given} needs --eagle-eval-prompts")
    elif options.offline_features is not None:
        raise ValueError(
            "--eagle-eval-prompts: with --eagle-offline-features there is no base to decode with; "
            "measure the saved draft by tools/eval_acceptance.py"
        )


def _check_parallel(options: EagleConfig) -> None:
    if options.algorithm != "p-eagle":
        if options.mask_token is not None:
            raise ValueError(
                f"--eagle-mask-token {options.mask_token}: only --eagle-algorithm p-eagle has one"
            )
        return
    if options.mask_token is None or options.mask_token < 0:
        raise ValueError(
            "--eagle-mask-token: --eagle-algorithm p-eagle needs the id of a token that texts do "
            f"not use, not {options.mask_token}"
        )
    for name in ("norm_before_fc", "detach_steps"):
        if getattr(options, name):
            raise ValueError(f"{flag_name(name)}: --eagle-algorithm p-eagle has no such thing")


def shown_flag(name: str, value: Any) -> str:
    """The flag as a user would have typed it."""
    words = value if isinstance(value, tuple) else () if value is True else (value,)
    return " ".join([flag_name(name), *map(str, words)])


def _check_aux_layers(layers: tuple[int, ...]) -> None:
    shown = " ".join(map(str, layers))
    if not layers:
        raise ValueError("--eagle-aux-layers needs at least one layer")
    if min(layers) < 0:
        raise ValueError(f"--eagle-aux-layers must not be negative: {shown}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"--eagle-aux-layers names a layer twice: {shown}")
    if list(layers) != sorted(layers):
        raise ValueError(f"--eagle-aux-layers must ascend: {shown}")
