"""The main job: flags, data, model and step handed to Megatron's own ``pretrain()``."""

from __future__ import annotations

import os
import sys
import time
import traceback

from megatron_eagle.cli.mistakes import report_mistake
from megatron_eagle.config.flags import parse_eagle_flags
from megatron_eagle.platform import enable

_STARTED = time.time()


def main() -> None:
    """Train a draft as ``sys.argv`` says. A user's mistake prints one line and exits with 2."""
    try:
        _train()
    except ValueError as error:
        if not _raised_by_us(error):
            raise
        os._exit(report_mistake(error))  # no rank waits for another


def _raised_by_us(error: ValueError) -> bool:
    """Whether the check that failed is this package's, which words its errors for users."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return innermost.f_globals.get("__name__", "").startswith("megatron_eagle.")


def _train() -> None:
    asks_for_help = {"-h", "--help"} & set(sys.argv[1:])
    options = None if asks_for_help else parse_eagle_flags(sys.argv[1:])
    enable()
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_eagle.compat import configure_nvtx_profiling
    from megatron_eagle.platform.compiler import compile_regions
    from megatron_eagle.training.arguments import parse_eagle_args, show_help
    from megatron_eagle.training.builder import ModelBuilder
    from megatron_eagle.training.data import DatasetProvider
    from megatron_eagle.training.evaluation import AcceptanceEvaluation
    from megatron_eagle.training.metrics_log import MetricsLog
    from megatron_eagle.training.step import ForwardStep, replace_schedule
    from megatron_eagle.training.vocab import draft_vocab_ids
    from megatron_eagle.training.warm_start import adopt_warm_start

    set_startup_timestamps(program_start=_STARTED, main_entry=time.time())
    if options is None:
        return show_help()
    options, stored = adopt_warm_start(options, sys.argv[1:])
    args, base = parse_eagle_args(options)
    compile_regions(options.train.compile)
    configure_nvtx_profiling(options.train.nvtx)
    replace_schedule(options)
    log = None if options.train.log_file is None else MetricsLog(options.train.log_file)
    if log is not None:
        log.attach()
    if options.train.eval_prompts is not None:
        AcceptanceEvaluation(args, options, base, log).attach()
    vocab_ids = draft_vocab_ids(args, options, base, stored)
    pretrain(
        pretrain_cfg_container_from_args(args),
        DatasetProvider(options, base),
        ModelType.encoder_or_decoder,
        ForwardStep(options, base.vocab_size),
        model_provider=ModelBuilder(options, base, vocab_ids, stored),
    )
    torch.distributed.destroy_process_group()
