"""Run a base over training data once and store the hidden states that a draft learns from.

    torchrun --nproc-per-node 8 -m megatron_eagle extract-features --base BASE --data data/chats \\
        --seq-length 2048 --dtype bfloat16 --tensor-model-parallel-size 4 --output FEATURES

Megatron's flags choose the layout of the base; its data-parallel replicas share the shards of the
output. A run that was stopped goes on where it was, in any layout.
``--verify FEATURES`` recomputes the checksums of finished features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.cli.boundary import (
    add_base_flags,
    at_least_one,
    end_process_groups,
    flags_of,
    names_of,
    run,
)
from megatron_eagle.cli.layers import IMPLEMENTATIONS, check_device
from megatron_eagle.cli.slurm import adopt_slurm
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError

STORED_DTYPES = ("float32", "bfloat16", "float8")
LAYOUT = {
    "--tensor-model-parallel-size": "ranks that share every layer",
    "--pipeline-model-parallel-size": "layers it does not divide evenly go to the first stage",
    "--context-parallel-size": "ranks over which every sequence is cut",
    "--expert-model-parallel-size": "ranks over which the base's experts are spread",
}
SIZES = names_of(LAYOUT)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    features = "--output" if args.verify is None else "--verify"
    flag_of = flags_of(
        args, base_checkpoint="--base", train_data="--data", offline_features=features
    )
    try:
        return run(partial(_extract if args.verify is None else _verify, args), flag_of)
    finally:
        end_process_groups()


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    add_base_flags(parser, required=False)
    parser.add_argument(
        "--data", metavar="FILE_OR_PREFIX",
        help="answers JSONL, or a data set of `megatron-eagle prepare-data`",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--seq-length", type=int, help="longer documents are cut there")
    parser.add_argument(
        "--aux-layers", type=int, nargs="+", metavar="LAYER",
        help="as --eagle-aux-layers of the training (default: as there)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="the base computes in"
    )
    parser.add_argument(
        "--store", choices=STORED_DTYPES, help="of the files (default: the one it computes in)"
    )
    parser.add_argument(
        "--transformer-impl", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS[0],
        help="modules that the base is made of",
    )  # fmt: skip
    for flag, text in LAYOUT.items():
        parser.add_argument(flag, type=int, default=1, metavar="N", help=text)
    parser.add_argument("--shard-mib", type=int, default=1024, help="size of a shard, about")
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="check features, do nothing else"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("base", "data", "output", "seq_length"):
        if getattr(args, name) is None:
            raise UserError(f"<{name}> is needed")
    at_least_one(args, "seq_length", "shard_mib", *SIZES)


def _verify(args: argparse.Namespace) -> int:
    from megatron_eagle.data.features.store import verify

    verify(args.verify)
    print(f"{args.verify}: all checksums are right")
    return 0


def _extract(args: argparse.Namespace) -> int:
    _check(args)
    adopt_slurm()
    from megatron_eagle.platform import enable

    check_device(args.transformer_impl, on_cpu=enable())
    import torch

    from megatron_eagle.checkpoint.atomic import owned_output
    from megatron_eagle.checkpoint.base_description import read_base
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.data.documents import FittedDocuments, open_documents
    from megatron_eagle.data.features.base_rows import BaseRows
    from megatron_eagle.data.features.extract import Replica, begin, extract, finish, plan_features
    from megatron_eagle.decode.load import load_base
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.training.layout import sizes_without_trainer

    info = read_base(args.base, args.base_description)
    sizes = sizes_without_trainer(info, **{name: getattr(args, name) for name in SIZES})
    layers = _aux_layers(args, info)
    documents = FittedDocuments(open_documents(args.data, info.vocab_size), args.seq_length)
    groups = start(0, **sizes)
    implementation, dtype = args.transformer_impl, getattr(torch, args.dtype)
    base = load_base(args.base, info, groups, layers, implementation=implementation, dtype=dtype)
    exchange = StageExchange.of(base, groups.pp)
    stored = args.store or args.dtype
    plan, total = plan_features(
        exchange, info, documents, str(args.data), stored, args.shard_mib << 20
    )
    first = torch.distributed.get_rank() == 0
    progress = (lambda line: print(line, flush=True)) if first else lambda _: None
    with owned_output(args.output, "output") if first else nullcontext():
        if first:
            begin(plan, args.output, total, progress)
        torch.distributed.barrier()  # a mistake of the first rank's stops the launcher, all ranks
        replica = Replica(groups.dp.rank(), groups.dp.size(), groups.ep.size() > 1)
        extract(BaseRows(exchange), documents, plan, args.output, replica, progress)
        torch.distributed.barrier()
        if first:
            finish(args.output)
            progress(f"{args.output}: train with --eagle-offline-features {args.output}")
    return 0


def _aux_layers(args: argparse.Namespace, info: BaseInfo) -> tuple[int, ...]:
    options = EagleConfig.of(aux_layers=args.aux_layers and tuple(args.aux_layers))
    count = info.megatron_args["num_layers"]
    least = options.train.ttt_steps + 2
    options.check_against_base(count, info.vocab_size, max(args.seq_length, least))
    if args.seq_length > info.megatron_args["max_position_embeddings"]:
        raise UserError(f"<seq_length> {args.seq_length} exceeds the base's positions")
    return options.spec.aux_layers_of(count)
