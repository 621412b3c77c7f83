"""Decode prompts speculatively: accepted length, acceptance, speed, equality with greedy decoding.

    megatron-eagle eval --base BASE --draft DRAFT --prompts prompts.jsonl
    torchrun --nproc-per-node 8 -m megatron_eagle eval ...     (the same, tensor-parallel)

Megatron's flags choose another layout. Ranks that neither tensor, pipeline nor expert parallelism
ties together decode different prompts, context-parallel ranks too; the figures are over all
prompts.

Exit status: 0; 1 when a speculative answer differs from the greedy one (the prompts are named; with
--bf16, where rounding may do that, it stays 0); 2 for a user's mistake. Accepted length is 1 + the
accepted drafts of a verification, averaged over all verifications of all prompts; the token that a
prefill gives is not a verification.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eagle.checkpoint.atomic import owned_output, write_json
from megatron_eagle.cli.boundary import (
    LARGEST_COUNT,
    add_base_flags,
    at_least_one,
    end_process_groups,
    flags_of,
    names_of,
    run,
)
from megatron_eagle.cli.layers import IMPLEMENTATIONS, check_device
from megatron_eagle.cli.slurm import adopt_slurm
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.checkpoint.directory import BaseInfo
    from megatron_eagle.teacher.base import FrozenBase

NO_DRAFT = "none"
CHAIN = 3
LAYOUT = {
    "--tensor-model-parallel-size": "default: all processes that the other sizes leave",
    "--pipeline-model-parallel-size": "layers it does not divide evenly go to the first stage",
    "--context-parallel-size": "these ranks decode different prompts: no sequence is cut",
    "--expert-model-parallel-size": "ranks over which the base's experts are spread",
    "--expert-tensor-parallel-size": "ranks that share an expert (default: as in training)",
}
SIZES = names_of(LAYOUT)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status, see above."""
    args = _parser(prog).parse_args(argv)
    try:
        return run(partial(_evaluate, args), flags_of(args, base_checkpoint="--base"))
    finally:
        end_process_groups()


def _parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    add_base_flags(parser)
    parser.add_argument(
        "--draft", required=True, metavar="CKPT",
        help=f"directory training saved to, its best/, or {NO_DRAFT!r} to time the base alone",
    )  # fmt: skip
    parser.add_argument(
        "--reinitialize", action="store_true",
        help="random weights instead of the checkpoint's, for the figure before training",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE",
        help="JSONL of prompt_ids, or of prompt (text) with --tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="Hugging Face directory, for text prompts"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--draft-tokens",
        type=int,
        help=f"drafted per verification (default: {CHAIN}; of a block draft all of a block)",
    )
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument(
        "--batch-size", type=int, default=16,
        help="prompts decoded together; 1 shows the latency gain, more finish sooner",
    )  # fmt: skip
    parser.add_argument(
        "--transformer-impl", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS[0],
        help="modules that base and draft are made of",
    )  # fmt: skip
    parser.add_argument(
        "--bf16", action="store_true",
        help="halve the memory; rounding may then tell speculative answers from greedy ones, "
        "which is no error",
    )  # fmt: skip
    for flag, text in LAYOUT.items():
        parser.add_argument(flag, type=int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of --reinitialize")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--card", type=Path, metavar="DIR",
        help="write the figures into the model card of this draft's export",
    )  # fmt: skip
    return parser


def _check(args: argparse.Namespace) -> None:
    at_least_one(args, "max_new_tokens", "draft_tokens", "limit", "batch_size", *SIZES)
    if not 0 <= args.seed <= LARGEST_COUNT:
        raise UserError(f"<seed> {args.seed} must be from 0 to {LARGEST_COUNT}")
    if args.reinitialize and args.draft == NO_DRAFT:
        raise UserError(f"<reinitialize> needs <draft> CKPT, not {NO_DRAFT!r}")
    if args.card is not None and (args.reinitialize or args.draft == NO_DRAFT):
        other = "<reinitialize>" if args.reinitialize else f"<draft> {NO_DRAFT}"
        raise UserError(f"<card>: {other} does not measure the trained draft")


def _load_base(
    args: argparse.Namespace, base: BaseInfo, groups: Any, aux_layers: Sequence[int]
) -> FrozenBase:
    """Load the base as the flags say: its modules, its precision."""
    import torch

    from megatron_eagle.decode.load import load_base

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    implementation = args.transformer_impl
    return load_base(
        args.base, base, groups, aux_layers, implementation=implementation, dtype=dtype
    )


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    adopt_slurm()
    from megatron_eagle.platform import enable

    check_device(args.transformer_impl, on_cpu=enable())
    from megatron_eagle.checkpoint.base_description import read_base
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.decode.acceptance import evaluate_acceptance
    from megatron_eagle.decode.load import fresh_draft, load_draft, read_draft_info
    from megatron_eagle.decode.prompt_shards import PromptShard, lockstep_groups
    from megatron_eagle.decode.prompts import read_prompt_ids, stop_ids
    from megatron_eagle.hf.draft.figures import ExportedCard
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.training.layout import sizes_without_trainer

    first = os.environ.get("RANK", "0") == "0"
    base = read_base(args.base, args.base_description)
    prompts = read_prompt_ids(args.prompts, args.tokenizer, base.vocab_size)[: args.limit]
    about = None if args.draft == NO_DRAFT else read_draft_info(args.draft, base)
    args.draft_tokens = args.draft_tokens or _draft_tokens(about)
    card = None if args.card is None else ExportedCard.of(args.card, args.draft)
    sizes = sizes_without_trainer(base, **{name: getattr(args, name) for name in SIZES})
    groups = start(args.seed, **sizes)
    frozen = _load_base(args, base, groups, about.info.aux_layers if about else ())
    exchange = StageExchange.of(frozen, groups.pp)
    draft = None
    if about is not None and args.reinitialize:
        draft = fresh_draft(about, frozen, exchange)
    elif about is not None:
        draft = load_draft(about, frozen, args.draft)
    shard = PromptShard.of(lockstep_groups(groups))
    report = evaluate_acceptance(
        frozen,
        draft,
        prompts,
        exchange=exchange,
        shard=shard,
        max_new_tokens=args.max_new_tokens,
        draft_tokens=args.draft_tokens,
        batch_size=args.batch_size,
        stop_ids=stop_ids(base),
        progress=(lambda text: print(text, flush=True)) if first else lambda _: None,
    )
    if first:
        _present(args, report, sizes)
        if card is not None and not report.mismatches:
            card.write({**report.as_dict(), **_settings(args)})
    return 1 if report.mismatches and not args.bf16 else 0


def _draft_tokens(about: Any) -> int:
    """Return how many tokens are drafted at a time if the user does not say."""
    spec = None if about is None else about.info.spec
    return spec.block_drafts if spec is not None and spec.method.drafts_blocks else CHAIN


def _present(args: argparse.Namespace, report: Any, sizes: dict[str, Any]) -> None:
    figures = report.as_dict()
    tokens = f"{report.tokens} tokens of {report.prompts} prompts, --batch-size {args.batch_size}"
    print(f"{tokens}, --max-new-tokens {args.max_new_tokens}, {'bf16' if args.bf16 else 'fp32'}")
    print(_speed("greedy", figures))
    if args.draft != NO_DRAFT:
        print(_speed("speculative", figures))
        print(
            f"accepted length {report.accepted_length:.3f}: 1 + accepted drafts per verification, "
            f"mean of {figures['verifications']} verifications of {args.draft_tokens} drafts"
        )
        if report.server_accepted_length != report.accepted_length:
            print(
                f"as servers count, drafts behind the end of an answer included: "
                f"{report.server_accepted_length:.3f}"
            )
        for name in ("acceptance", "conditional_acceptance"):
            rates = " ".join(f"{rate:.3f}" for rate in figures[name])
            print(f"{name.replace('_', ' ')} per chain position: {rates}")
        if not report.mismatches:
            print("speculative answers equal the greedy ones, token by token")
    for mismatch in report.mismatches:
        gap = "" if mismatch.logit_gap is None else f", logit gap {mismatch.logit_gap:.2e}"
        kind = "note" if args.bf16 else "error"
        print(
            f"{kind}: prompt {mismatch.prompt} (counted from 0): answer token {mismatch.index} is "
            f"{mismatch.speculative}, greedy {mismatch.greedy}{gap}",
            file=sys.stderr,
        )
    if args.output is not None:
        _write(args.output, {**figures, **_settings(args), "layout": sizes})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "base", "draft", "reinitialize", "max_new_tokens", "draft_tokens", "batch_size",
        "transformer_impl", "bf16",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def _speed(name: str, figures: dict[str, Any]) -> str:
    seconds, rate = figures[f"{name}_seconds"], figures[f"{name}_tokens_per_second"]
    return f"{name}: {seconds:.2f} s, {rate:.1f} tokens/s"


def _write(path: Path, figures: dict[str, Any]) -> None:
    with owned_output(path, "output"):
        write_json(path, figures)


if __name__ == "__main__":
    raise SystemExit(main())
