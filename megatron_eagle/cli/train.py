"""Train an EAGLE draft on a frozen base inside Megatron's trainer.

    torchrun --nproc-per-node 2 -m megatron_eagle train --eagle-base-checkpoint BASE \\
        --eagle-train-data answers.jsonl --tensor-model-parallel-size 2 --seq-length 256 ...

Options, data, model and step are handed to Megatron's own ``pretrain()``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_eagle.cli.boundary import flag, run
from megatron_eagle.cli.slurm import adopt_slurm
from megatron_eagle.config.eagle_config import OPTIONS
from megatron_eagle.config.flags import parse_eagle_flags
from megatron_eagle.config.option import flag_name
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.checkpoint.directory import BaseInfo
    from megatron_eagle.config import EagleConfig
    from megatron_eagle.hf.draft.checkpoint import StoredDraft

_STARTED = time.time()
_ALIASES = {
    "prompts": "--eagle-eval-prompts",
    "max_new_tokens": "--eagle-eval-new-tokens",
    "tokenizer": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model",
    "adapt": "`megatron-eagle import-draft` with --adapt",
}
"""Parameters of library code that training has an option of another name for."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train a draft as ``argv`` (``sys.argv[1:]`` by default) says and return 0.

    A user's mistake prints one line and ends the process with status 2 from here, because other
    ranks may be waiting for this one. ``sys.argv``, which Megatron's parser reads, is replaced.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    sys.argv = [prog or sys.argv[0], *words]
    status = run(partial(_train, words), flag_of, _is_mistake)
    if status:
        os._exit(status)
    return status


def flag_of(parameter: str) -> str:
    """Return the training flag of ``parameter``: ``--eagle-...`` for an option of this package,
    and Megatron's flag for any other."""
    if parameter in _ALIASES:
        return _ALIASES[parameter]
    return flag_name(parameter) if parameter in OPTIONS else flag(parameter)


def _is_mistake(error: Exception) -> bool:
    """Return false for an error inside Megatron or torch, whose traceback is wanted."""
    return isinstance(error, UserError)


def _train(argv: Sequence[str]) -> int:
    adopt_slurm()
    asks_for_help = not {"-h", "--help"}.isdisjoint(argv)
    if asks_for_help:
        logging.getLogger("megatron_eagle").setLevel(logging.WARNING)  # the help alone
    options = None if asks_for_help else parse_eagle_flags(argv)
    from megatron_eagle.platform import enable

    enable()
    import torch
    from megatron.training import set_startup_timestamps

    from megatron_eagle.training.arguments import parse_eagle_args, show_help
    from megatron_eagle.training.megatron_refusals import name_tokenizer_in_errors
    from megatron_eagle.training.save_place import own_save
    from megatron_eagle.training.warm_start import adopt_warm_start

    set_startup_timestamps(program_start=_STARTED, main_entry=time.time())
    if options is None:
        show_help()
    options, stored = adopt_warm_start(options, argv)
    name_tokenizer_in_errors()
    args, base = parse_eagle_args(options, argv)
    with own_save(args):
        _pretrain(args, options, base, stored)
    torch.distributed.destroy_process_group()
    return 0


def _pretrain(
    args: argparse.Namespace, options: EagleConfig, base: BaseInfo, stored: StoredDraft | None
) -> None:
    """Attach what this package adds to Megatron's trainer, and run it."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_eagle.compat import configure_nvtx_profiling
    from megatron_eagle.kernels.choice import choose_kernels
    from megatron_eagle.platform.compiler import compile_regions
    from megatron_eagle.training.builder import ModelBuilder
    from megatron_eagle.training.data import DatasetProvider
    from megatron_eagle.training.evaluation import AcceptanceEvaluation
    from megatron_eagle.training.metrics_log import MetricsLog
    from megatron_eagle.training.nan_stop import noted_iterations, stop_at_nan
    from megatron_eagle.training.resume import name_checkpoints_in_errors
    from megatron_eagle.training.step import ForwardStep, replace_schedule
    from megatron_eagle.training.throughput import Throughput
    from megatron_eagle.training.vocab import draft_vocab_ids

    compile_regions(options.train.compile)
    choose_kernels(options.train.kernels)
    configure_nvtx_profiling(options.train.nvtx)
    schedule = replace_schedule(options)
    name_checkpoints_in_errors()
    stop_at_nan(args, noted_iterations(args.save))
    throughput, log = Throughput(), None
    if options.train.log_file is not None:
        log = MetricsLog(options.train.log_file, throughput)
        log.attach()
    throughput.attach()
    if options.train.eval_prompts is not None:
        AcceptanceEvaluation(args, options, base, log).attach()
    vocab_ids = draft_vocab_ids(args, options, base, stored)
    step = ForwardStep(
        options,
        base.vocab_size,
        args.global_batch_size,
        throughput,
        rejects_spikes=args.check_for_spiky_loss,
    )
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            DatasetProvider(options, base, vocab_ids),
            ModelType.encoder_or_decoder,
            step,
            model_provider=ModelBuilder(options, base, vocab_ids, stored, throughput),
        )
    except SystemExit:  # at an interval, after a time or by a signal, on all ranks together
        schedule.finish()
        raise
