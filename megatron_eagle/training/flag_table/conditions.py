"""Refuse flags that are honoured only beside others, or only where a package is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError
from megatron_eagle.training.flag_table.check import CommandLine

_DATA_SOURCES = (
    "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path",
    "--data-args-path", "--per-split-data-args-path", "--mock-data",
)  # fmt: skip
_DATA_DETAILS = (
    "--split", "--data-cache-path", "--no-mmap-bin-files", "--eod-mask-loss",
    "--num-dataset-builder-threads", "--mid-level-dataset-surplus",
)  # fmt: skip
_VALIDATION = (
    "--eval-iters", "--eval-interval", "--start-eval-at-iter", "--eval-global-batch-size",
    "--eval-micro-batch-size",
)  # fmt: skip
_FP32 = (
    "fp32: no flash kernel of a GPU takes it, so the memory of attention is quadratic in "
    "--seq-length; --bf16 has kernels"
)
_OF_HEAD = ("--decoupled-lr", "--decoupled-min-lr")
_NEEDS_TRANSFORMER_ENGINE = ("--use-precision-aware-optimizer", "--optimizer-cpu-offload")
_PACKAGES = {
    "--wandb-project": ("wandb", "pip install 'megatron-eagle[tracking]'"),
    "--tensorboard-dir": ("tensorboard", "pip install 'megatron-eagle[tracking]'"),
    "--num-distributed-optimizer-instances": ("einops", "pip install einops"),
}
"""Flags whose value other than the default needs a package, and how to get it."""


def check_conditions(
    line: CommandLine,
    options: EagleConfig,
    layers: str,
    installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
    *,
    on_gpu: bool = False,
) -> list[str]:
    """Check the flags of ``line`` against each other, the ``--eagle-*`` options, the
    implementation of the ``layers``, the packages that are ``installed`` and the device.

    Returns lines of text on flags without effect, and on what they cost. Raises ``UserError``
    naming a flag.
    """
    _check_packages(line, installed)
    _check_tracking(line)
    method = options.spec.method
    if method.shares_base_head or method.drafts_blocks:
        why = f"would change nothing: --eagle-algorithm {method.name} has the base's frozen head"
        _refuse(line, _OF_HEAD, why)
    if layers == "local":
        _refuse(line, ["--moe-grouped-gemm"], "needs --transformer-impl transformer_engine")
    stages = line.values.pipeline_model_parallel_size
    if stages > 1:
        why = f"is not supported with --pipeline-model-parallel-size {stages}: stages run ahead"
        _refuse(line, ["--check-for-spiky-loss"], why)
    costs = [_FP32] if on_gpu and not (line.values.bf16 or line.values.fp16) else []
    return [*_documents(line, options), *costs]


def _check_packages(line: CommandLine, installed: Callable[[str], bool]) -> None:
    for name, (package, remedy) in _PACKAGES.items():
        flag = line.flag(name)
        if flag is not None and flag.value != flag.default and not installed(package):
            raise UserError(f"{flag} needs the package {package}: {remedy}")
    if not installed("transformer_engine"):
        _refuse(line, _NEEDS_TRANSFORMER_ENGINE, "needs Transformer Engine's Adam")
    optimizer = line.flag("--optimizer")
    emerging = optimizer is not None and optimizer.value not in ("adam", "sgd")
    if emerging and not installed("emerging_optimizers"):
        raise UserError(f"{optimizer} needs the package emerging-optimizers")


def _check_tracking(line: CommandLine) -> None:
    """Refuse a W&B project that Megatron would open on the last rank alone and fail there, or to
    which it would send no loss."""
    project = line.flag("--wandb-project")
    if project is None or not project.value:
        return
    if not line.values.wandb_exp_name:
        raise UserError(f"{project} needs --wandb-exp-name, a name for this run")
    if not (line.values.wandb_save_dir or line.values.save):
        raise UserError(f"{project} needs --wandb-save-dir, or --save, to put its files there")
    if not line.values.tensorboard_dir:
        raise UserError(
            f"{project} needs --tensorboard-dir: Megatron sends losses to W&B only beside those "
            "that it writes there"
        )


def _documents(line: CommandLine, options: EagleConfig) -> Iterator[str]:
    """Yield what has no effect where ``--eagle-train-data`` or features hold the documents."""
    if not options.train.reads_documents:
        return
    source = "train-data" if options.train.offline_features is None else "offline-features"
    _refuse(line, _DATA_SOURCES, f"contradicts --eagle-{source}, which holds the documents")
    details = [str(flag) for flag in line.given if flag.name in _DATA_DETAILS]
    if details:
        yield f"no effect: {', '.join(details)} (--eagle-{source} holds the documents)"
    validation = [str(flag) for flag in line.given if flag.name in _VALIDATION]
    if validation:
        yield (
            f"no effect: {', '.join(validation)} (documents have no validation split; "
            "--eagle-eval-prompts measures the draft)"
        )


def _refuse(line: CommandLine, names: list[str] | tuple[str, ...], why: str) -> None:
    for flag in line.given:
        if flag.name in names and flag.value != flag.default:
            raise UserError(f"{flag} {why}")
