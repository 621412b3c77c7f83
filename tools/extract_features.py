"""Run a base over training data once and keep the hidden states a draft learns from.

    torchrun --nproc-per-node 8 tools/extract_features.py --base BASE --data data/chats \\
        --seq-length 2048 --dtype bfloat16 --tensor-model-parallel-size 4 --output FEATURES

Ranks beyond the tensor-parallel ones share the shards. A run that was stopped goes on where it was.
`--verify FEATURES` recomputes the checksums of finished features.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.data.feature_rows import STORED_DTYPES
from megatron_eagle.platform import enable
from megatron_eagle.platform.mistakes import report_mistake


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
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--shard-mib", type=int, default=1024, help="size of a shard, about")
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="check features, do nothing else"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("base", "data", "output", "seq_length"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is needed")
    for name in ("seq_length", "tensor_model_parallel_size", "shard_mib"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be at least 1, not {getattr(args, name)}")
    world, size = int(os.environ.get("WORLD_SIZE", "1")), args.tensor_model_parallel_size
    if world % size:
        raise ValueError(
            f"--tensor-model-parallel-size {size} does not divide the {world} processes"
        )


def _verify(directory: Path) -> int:
    from megatron_eagle.data.feature_store import verify

    verify(directory)
    print(f"{directory}: all checksums are right")
    return 0


def _extract(args: argparse.Namespace) -> None:
    from megatron_eagle.checkpoint_dir import load_base_json
    from megatron_eagle.config import EagleConfig
    from megatron_eagle.data.documents import FittedDocuments, open_documents
    from megatron_eagle.data.extract import begin, extract, finish
    from megatron_eagle.decode.load import load_base
    from megatron_eagle.training.standalone import start

    info = load_base_json(args.base)
    layers = EagleConfig(aux_layers=args.aux_layers and tuple(args.aux_layers))
    count = info.megatron_args["num_layers"]
    layers.check_against_base(count, info.vocab_size, max(args.seq_length, layers.ttt_steps + 2))
    if args.seq_length > info.megatron_args["max_position_embeddings"]:
        raise ValueError(f"--seq-length {args.seq_length} exceeds the base's positions")
    documents = FittedDocuments(open_documents(args.data, info.vocab_size), args.seq_length)
    groups = start(0, args.tensor_model_parallel_size)
    base = load_base(args.base, info, groups, layers.captured_layers(count))
    base.to(getattr(torch, args.dtype))
    plan, total = _plan(args, info, documents, base)
    first = torch.distributed.get_rank() == 0
    progress = (lambda line: print(line, flush=True)) if first else lambda _: None
    if first:
        begin(plan, args.output, total, progress)
    torch.distributed.barrier()  # a mistake found there stops the launcher, and all ranks
    replica = (groups.dp.rank(), groups.dp.size())
    extract(base, documents, plan, args.output, replica, progress)
    torch.distributed.barrier()
    if first:
        finish(args.output)
        progress(f"{args.output}: train with --eagle-offline-features {args.output}")


def _plan(args: argparse.Namespace, info: Any, documents: Any, base: Any) -> tuple[Any, int]:
    """What will be written, and its bytes."""
    from megatron_eagle.data.extract import cut_into_shards, survey
    from megatron_eagle.data.feature_rows import RowCodec
    from megatron_eagle.data.feature_store import FeaturePlan

    stored, width = args.store or args.dtype, base.config.hidden_size
    codecs = [RowCodec(stored, blocks, width) for blocks in (len(base.taps.layers), 1)]
    sizes, digest = survey(documents, (codecs[0].row_bytes, codecs[1].row_bytes))
    plan = FeaturePlan(
        base=info.name,
        fingerprint=info.fingerprint,
        source=str(args.data),
        documents=digest,
        seq_length=args.seq_length,
        aux_layers=base.taps.layers,
        hidden_size=width,
        vocab_size=info.vocab_size,
        stored=stored,
        computed=args.dtype,
        layer_sizes=tuple(base.layer_sizes().tolist()),
        shards=cut_into_shards(sizes, args.shard_mib << 20),
    )
    return plan, sum(sizes)


if __name__ == "__main__":
    raise SystemExit(main())
