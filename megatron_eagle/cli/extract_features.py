"""Run a base over training data once and keep the hidden states a draft learns from.

    torchrun --nproc-per-node 8 tools/extract_features.py --base BASE --data data/chats \\
        --seq-length 2048 --dtype bfloat16 --tensor-model-parallel-size 4 --output FEATURES

The base runs in any layout, by Megatron's flags; replicas of it share the shards. A run that was
stopped goes on where it was, in any layout.
`--verify FEATURES` recomputes the checksums of finished features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_eagle.checkpoint.directory import BaseInfo, load_base_json
from megatron_eagle.cli.mistakes import report_mistake
from megatron_eagle.config import EagleConfig
from megatron_eagle.data.features.codec import STORED_DTYPES
from megatron_eagle.platform import enable

SIZES = {
    "tensor-model": "ranks that share every layer",
    "pipeline-model": "stages; layers that they do not divide evenly go to the first",
    "context": "ranks over which every sequence is cut",
    "expert-model": "ranks over which the base's experts are spread",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one `error:` line on stderr."""
    args = _parser().parse_args(argv)
    try:
        if args.verify is not None:
            return _verify(args.verify)
        _check(args)
        enable()
        _extract(args)
    except (ValueError, OSError) as error:
        return report_mistake(error)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="CKPT", help="base checkpoint (tools/import_base.py)")
    parser.add_argument(
        "--data", metavar="FILE_OR_PREFIX",
        help="answers JSONL, or a data set of tools/prepare_data.py",
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
    for name, text in SIZES.items():
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--shard-mib", type=int, default=1024, help="size of a shard, about")
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="check features, do nothing else"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("base", "data", "output", "seq_length"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is needed")
    sizes = [f"{name.replace('-', '_')}_parallel_size" for name in SIZES]
    for name in ("seq_length", "shard_mib", *sizes):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be at least 1, not {getattr(args, name)}")


def _check_layout(args: argparse.Namespace, info: BaseInfo) -> None:
    """Before any rank can wait for another."""
    from megatron_eagle.training.layout import check_processes

    tensor, pipeline, context, expert = (
        getattr(args, f"{name.replace('-', '_')}_parallel_size") for name in SIZES
    )
    if expert > 1 and not info.megatron_args.get("num_experts"):
        raise ValueError(f"--expert-model-parallel-size {expert}: the base has no experts")
    names = [f"{name}-parallel" for name in SIZES]
    check_processes(dict(zip(names[:3], (tensor, pipeline, context), strict=True)))
    if expert > 1:  # which tensor-parallel ranks share, or not
        shared = info.megatron_args.get("expert_tensor_parallel_size") or tensor
        check_processes(dict(zip(names, (shared, pipeline, 1, expert), strict=True)))


def _verify(directory: Path) -> int:
    from megatron_eagle.data.features.store import verify

    verify(directory)
    print(f"{directory}: all checksums are right")
    return 0


def _extract(args: argparse.Namespace) -> None:
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.data.documents import FittedDocuments, open_documents
    from megatron_eagle.data.features.base_rows import BaseRows
    from megatron_eagle.data.features.extract import Replica, begin, extract, finish, plan_features
    from megatron_eagle.decode.load import load_base
    from megatron_eagle.pipeline.exchange import StageExchange

    info = load_base_json(args.base)
    _check_layout(args, info)
    layers = _captured_layers(args, info)
    documents = FittedDocuments(open_documents(args.data, info.vocab_size), args.seq_length)
    groups = start(
        0,
        args.tensor_model_parallel_size,
        info.megatron_args.get("expert_tensor_parallel_size"),
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
    )
    base = load_base(args.base, info, groups, layers).to(getattr(torch, args.dtype))
    exchange = StageExchange.of(base, groups.pp)
    stored = args.store or args.dtype
    plan, total = plan_features(
        exchange, info, documents, str(args.data), stored, args.shard_mib << 20
    )
    first = torch.distributed.get_rank() == 0
    progress = (lambda line: print(line, flush=True)) if first else lambda _: None
    if first:
        begin(plan, args.output, total, progress)
    torch.distributed.barrier()  # a mistake found there stops the launcher, and all ranks
    replica = Replica(groups.dp.rank(), groups.dp.size(), groups.ep.size() > 1)
    extract(BaseRows(exchange), documents, plan, args.output, replica, progress)
    torch.distributed.barrier()
    if first:
        finish(args.output)
        progress(f"{args.output}: train with --eagle-offline-features {args.output}")


def _captured_layers(args: argparse.Namespace, info: BaseInfo) -> tuple[int, ...]:
    options = EagleConfig.of(aux_layers=args.aux_layers and tuple(args.aux_layers))
    count = info.megatron_args["num_layers"]
    least = options.train.ttt_steps + 2
    options.check_against_base(count, info.vocab_size, max(args.seq_length, least))
    if args.seq_length > info.megatron_args["max_position_embeddings"]:
        raise ValueError(f"--seq-length {args.seq_length} exceeds the base's positions")
    return options.spec.aux_layers_of(count)


if __name__ == "__main__":
    raise SystemExit(main())
