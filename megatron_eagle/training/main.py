"""The main job: flags, data, model and step handed to Megatron's own ``pretrain()``."""

from __future__ import annotations

import os
import sys
import time

_STARTED = time.time()


def main() -> None:
    """Train a draft as ``sys.argv`` says. A user's mistake prints one line and exits with 2."""
    try:
        _train()
    except ValueError as error:
        if not _is_users_mistake(error):
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # peers exit by themselves: every rank sees the same mistake


def _is_users_mistake(error: ValueError) -> bool:
    return str(error).startswith("--") or ": " in str(error).partition("\n")[0]


def _train() -> None:
    from megatron_eagle.platform import enable

    enable()
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_eagle.platform.compiler import compile_regions
    from megatron_eagle.platform.nvtx import mark_ranges
    from megatron_eagle.training.arguments import parse_eagle_args
    from megatron_eagle.training.builder import ModelBuilder
    from megatron_eagle.training.data import DatasetProvider
    from megatron_eagle.training.metrics_log import MetricsLog
    from megatron_eagle.training.step import ForwardStep, reduce_metrics_once_per_step
    from megatron_eagle.training.vocab import draft_vocab_ids

    set_startup_timestamps(program_start=_STARTED, main_entry=time.time())
    args, options, base = parse_eagle_args()
    compile_regions(options.compile)
    mark_ranges(options.nvtx)
    reduce_metrics_once_per_step(options)
    if options.log_file is not None:
        MetricsLog(options.log_file).attach()
    vocab_ids = draft_vocab_ids(args, options, base)
    pretrain(
        pretrain_cfg_container_from_args(args),
        DatasetProvider(options.train_data, base.vocab_size),
        ModelType.encoder_or_decoder,
        ForwardStep(options),
        model_provider=ModelBuilder(options, base, vocab_ids),
    )
    torch.distributed.destroy_process_group()
