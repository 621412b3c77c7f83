"""What ``--load`` resumes, looked at before Megatron loads it.

Megatron warns where there is nothing to load, and ends in an assertion or with exit status 0 where
the run in the checkpoint was another one. Here each of these is one line that names the flag.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_eagle.checkpoint.directory import TRACKER_NAME, iteration_directory
from megatron_eagle.checkpoint.loading import reason_of
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.writer import COMMON_STATE
from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import naming, reading

_LOAD = "megatron.training.training:load_checkpoint"
_SAVE = "megatron.training.training:save_checkpoint_and_time"
_GPT_TO_HYBRID = "megatron.training.checkpointing:_maybe_setup_gpt_to_hybrid_load"
_RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
"""Formats of the distributed optimizer's state that load at another TP and PP."""


def resumed_checkpoint(args: Any) -> CheckpointReader | None:
    """Open the checkpoint that ``--load`` will resume; None if the run begins anew.

    An empty ``--load`` begins a run only where ``--save`` will fill it: another one is a mistake in
    a path. Raises ``UserError`` naming ``<load>`` for that and for a damaged checkpoint.
    """
    if args.load is None:
        return None
    with naming("load"), reading("load", args.load):
        step = getattr(args, "ckpt_step", None)
        if step is None and not (Path(args.load) / TRACKER_NAME).is_file():
            if args.save is not None and Path(args.load).resolve() == Path(args.save).resolve():
                return None
            raise UserError(
                f"<load> {literal(args.load)}: no checkpoint there; a run that is to begin anew "
                "there gives the directory as <save> too"
            )
        directory = Path(args.load) if step is None else iteration_directory(args.load, step)
        checkpoint = CheckpointReader.open(directory)
        checkpoint.check_files()
        return checkpoint


def check_resume(args: Any, checkpoint: CheckpointReader) -> None:
    """Raise ``UserError`` naming the flag if the run in ``checkpoint`` cannot be gone on with."""
    if not checkpoint.has_object(COMMON_STATE):  # an older Megatron wrote it beside the shards
        return
    common = checkpoint.load_object(COMMON_STATE)
    state = common[0] if isinstance(common, list) and common else None
    if not isinstance(state, dict):
        raise UserError(f"<load> {literal(args.load)}: its common state is damaged")
    saved = state.get("args")
    if args.finetune or saved is None:
        return
    if not args.no_load_optim and not getattr(saved, "no_save_optim", False):
        _check_optimizer(args, saved, state)
        _check_schedule(args, saved, state.get("opt_param_scheduler"))


def _check_optimizer(args: Any, saved: Any, state: dict[str, Any]) -> None:
    where = f"<load> {literal(args.load)}"
    before, now = (bool(a.use_distributed_optimizer) for a in (saved, args))
    if before != now:
        did, do = ("with", "add") if before else ("without", "leave out")
        raise UserError(
            f"{where}: saved {did} <use_distributed_optimizer>; {do} it, or give <no_load_optim> "
            "to load the weights alone"
        )
    if not now:
        return
    then_ranks, now_ranks = (
        (a.tensor_model_parallel_size, a.pipeline_model_parallel_size) for a in (saved, args)
    )
    metadata = state.get("content_metadata") or {}
    if then_ranks != now_ranks and metadata.get("distrib_optim_sharding_type") not in _RESHARDABLE:
        raise UserError(
            f"{where}: saved with <use_distributed_optimizer> at tensor and pipeline parallelism "
            f"{then_ranks[0]} and {then_ranks[1]}, this run has {now_ranks[0]} and "
            f"{now_ranks[1]}; resume as it was, save with <dist_ckpt_optim_fully_reshardable>, or "
            "give <no_load_optim> to load the weights alone"
        )


def _check_schedule(args: Any, saved: Any, scheduler: Any) -> None:
    """Compare what Megatron's OptimizerParamScheduler will compare."""
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    names = (
        "global_batch_size",
        "weight_decay",
        "train_iters",
        "train_samples",
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_warmup_fraction",
        "start_weight_decay",
        "end_weight_decay",
        "weight_decay_incr_style",
        "lr_decay_iters",  # Megatron fills it in: it comes last
        "lr_decay_samples",
    )
    if not isinstance(scheduler, dict) or _schedule(args) == _schedule(saved):
        return
    for name in names:
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if before != now and name in ("lr", "min_lr"):
            raise UserError(
                f"<{name}> {now}: the run in <load> {literal(args.load)} had {before}, by which "
                "Megatron finds its optimizer; give that, or <no_load_optim> for the weights alone"
            )
        if before != now:
            raise UserError(
                f"<{name}> {now}: the run in <load> {literal(args.load)} had {before}, which its "
                "learning rate follows; give <override_opt_param_scheduler> to follow the new "
                "flags or <use_checkpoint_opt_param_scheduler> to follow the old ones"
            )


def _schedule(args: Any) -> tuple[Any, ...]:
    """Return what Megatron makes of a run's flags for its scheduler, as it compares it."""
    if args.train_iters:
        steps = (args.lr_decay_iters or args.train_iters) * args.global_batch_size
        decay = args.train_iters * args.global_batch_size
        warmup = args.lr_warmup_iters * args.global_batch_size
    else:
        steps, decay = args.lr_decay_samples or args.train_samples, args.train_samples
        warmup = args.lr_warmup_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * steps
    weight_decay = (
        args.start_weight_decay,
        args.end_weight_decay,
        args.weight_decay_incr_style,
    )
    return args.lr, args.min_lr, args.lr_decay_style, warmup, steps, decay, weight_decay


def name_checkpoints_in_errors() -> None:
    """Make what fails while Megatron loads or saves a checkpoint one line with its directory.

    Megatron ends such a run in an assertion, in PyTorch's CheckpointException or, where the
    optimizer does not fit, with exit status 0. Must run before ``pretrain()``.
    """
    load, save = require(_LOAD), require(_SAVE)

    @functools.wraps(load)
    def load_checkpoint(*rest: Any, **options: Any) -> Any:
        try:
            return load(*rest, **options)
        except UserError:
            raise
        except (Exception, CheckpointException, SystemExit) as error:
            raise UserError(
                f"<load> {literal(get_args().load)}: cannot be resumed: {_why(error)}"
            ) from error

    @functools.wraps(save)
    def save_checkpoint(iteration: int, *rest: Any, **options: Any) -> Any:
        try:
            return save(iteration, *rest, **options)
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"<save> {literal(get_args().save)}: the checkpoint of iteration {iteration} "
                f"cannot be written: {_why(error)}"
            ) from error

    patch(_LOAD, load_checkpoint, "name the checkpoint that cannot be loaded")
    patch(_SAVE, save_checkpoint, "name the checkpoint that cannot be written")
    # By the pattern of a hybrid base, Megatron would take the draft in a checkpoint for one.
    never = (None, False)
    patch(_GPT_TO_HYBRID, lambda *_: never, "a draft is neither a GPTModel nor a HybridModel")


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "Megatron gave up, see above"
    return f"{type(error).__name__}: {reason_of(error)}" if not str(error) else reason_of(error)
