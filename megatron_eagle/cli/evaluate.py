"""Greedy speculative decoding with base and draft: accepted length, acceptance, speed, equality.

    python tools/eval_acceptance.py --base BASE --draft DRAFT --prompts prompts.jsonl
    torchrun --nproc-per-node 8 tools/eval_acceptance.py ...     (the same, tensor-parallel)

Other layouts by Megatron's flags. Ranks that neither tensor, pipeline nor expert parallelism ties
together decode prompts of their own, context-parallel ones too; the figures are of all prompts.

Exit status: 0; 1 when a speculative answer is not the greedy one (the prompts are named); 2 for a
user's mistake. Accepted length is 1 + accepted drafts per verification, the mean over all
verifications of all prompts; the token a prefill gives is no verification.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.cli.mistakes import report_mistake
from megatron_eagle.platform import enable

NO_DRAFT = "none"
_SIZES = {
    "tensor-model": "default: all processes that the other sizes leave",
    "pipeline-model": "stages; layers that they do not divide evenly go to the first",
    "context": "decodes prompts of its own: no sequence is cut",
    "expert-model": "ranks over which the base's experts are spread",
    "expert-tensor": "ranks that share an expert (default: as in training)",
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        _check(args)
        enable()
        return _run(args, first)
    except (ValueError, OSError) as error:
        return report_mistake(error)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base", required=True, metavar="CKPT", help="base checkpoint (tools/import_base.py)"
    )
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
    parser.add_argument("--draft-tokens", type=int, default=3, help="drafted per verification")
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument(
        "--batch-size", type=int, default=16,
        help="prompts decoded together; 1 shows the latency gain, more finish sooner",
    )  # fmt: skip
    for name, text in _SIZES.items():
        parser.add_argument(f"--{name}-parallel-size", type=int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of --reinitialize")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def _check(args: argparse.Namespace) -> None:
    sizes = [f"{name.replace('-', '_')}_parallel_size" for name in _SIZES]
    for name in ("max_new_tokens", "draft_tokens", "limit", "batch_size", *sizes):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.reinitialize and args.draft == NO_DRAFT:
        raise ValueError(f"--reinitialize needs --draft CKPT, not {NO_DRAFT!r}")


def _sizes(args: argparse.Namespace, base: Any) -> dict[str, Any]:
    """The layout for ``start``, checked before any rank can wait for another."""
    from megatron_eagle.training.layout import check_processes

    pipeline, context, expert = (
        getattr(args, f"{name}_parallel_size") or 1
        for name in ("pipeline_model", "context", "expert_model")
    )
    rest = {
        "pipeline-model-parallel": pipeline,
        "context-parallel": context,
        "expert-model-parallel": expert,
    }
    if (expert > 1 or args.expert_tensor_parallel_size) and not base.megatron_args.get(
        "num_experts"
    ):
        raise ValueError(f"--expert-model-parallel-size {expert}: the base has no experts")
    tensor = args.tensor_model_parallel_size
    if tensor is None:
        check_processes(rest)
        tensor = int(os.environ.get("WORLD_SIZE", "1")) // (pipeline * context * expert)
    check_processes({"tensor-model-parallel": tensor, **rest, "expert-model-parallel": 1})
    expert_tensor = args.expert_tensor_parallel_size or base.megatron_args.get(
        "expert_tensor_parallel_size"
    )
    check_processes({
        "expert-model-parallel": expert,
        "expert-tensor-parallel": expert_tensor or tensor,
        "pipeline-model-parallel": pipeline,
    })  # fmt: skip
    return {
        "tensor_parallel": tensor,
        "pipeline": pipeline,
        "context": context,
        "expert": expert,
        "expert_tensor_parallel": expert_tensor,
    }


def _run(args: argparse.Namespace, first: bool) -> int:
    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.cli.process_groups import start
    from megatron_eagle.decode.acceptance import evaluate_acceptance
    from megatron_eagle.decode.load import fresh_draft, load_base, load_draft, read_draft_info
    from megatron_eagle.decode.prompt_shards import PromptShard, lockstep_groups
    from megatron_eagle.decode.prompts import read_prompt_ids, stop_ids
    from megatron_eagle.pipeline.links import StageLinks

    base = load_base_json(args.base)
    prompts = read_prompt_ids(args.prompts, args.tokenizer, base.vocab_size)[: args.limit]
    about = None if args.draft == NO_DRAFT else read_draft_info(args.draft, base)
    sizes = _sizes(args, base)
    groups = start(args.seed, **sizes)
    frozen = load_base(args.base, base, groups, about.info.aux_layers if about else ())
    links = StageLinks(groups.pp) if groups.pp.size() > 1 else None
    draft = None
    if about is not None and args.reinitialize:
        draft = fresh_draft(about, frozen, links)
    elif about is not None:
        draft = load_draft(about, frozen, args.draft)
    shard = PromptShard.of(lockstep_groups(groups))
    report = evaluate_acceptance(
        frozen,
        draft,
        prompts,
        links=links,
        shard=shard,
        max_new_tokens=args.max_new_tokens,
        draft_tokens=args.draft_tokens,
        batch_size=args.batch_size,
        stop_ids=stop_ids(base),
        progress=(lambda text: print(text, flush=True)) if first else lambda _: None,
    )
    if first:
        _present(args, report, sizes)
    return 1 if report.mismatches else 0


def _present(args: argparse.Namespace, report: Any, sizes: dict[str, Any]) -> None:
    figures = report.as_dict()
    tokens = f"{report.tokens} tokens of {report.prompts} prompts, --batch-size {args.batch_size}"
    print(f"{tokens}, --max-new-tokens {args.max_new_tokens}, fp32")
    print(_speed("greedy", figures))
    if args.draft != NO_DRAFT:
        print(_speed("speculative", figures))
        print(
            f"accepted length {report.accepted_length:.3f}: 1 + accepted drafts per verification, "
            f"mean of {figures['verifications']} verifications of {args.draft_tokens} drafts"
        )
        for name in ("acceptance", "conditional_acceptance"):
            rates = " ".join(f"{rate:.3f}" for rate in figures[name])
            print(f"{name.replace('_', ' ')} per chain position: {rates}")
        if not report.mismatches:
            print("speculative answers equal the greedy ones, token by token")
    for mismatch in report.mismatches:
        gap = "" if mismatch.logit_gap is None else f", logit gap {mismatch.logit_gap:.2e}"
        print(
            f"error: prompt {mismatch.prompt} (counted from 0): answer token {mismatch.index} is "
            f"{mismatch.speculative}, greedy {mismatch.greedy}{gap}",
            file=sys.stderr,
        )
    if args.output is not None:
        _write(args.output, {**figures, **_settings(args), "layout": sizes})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("base", "draft", "reinitialize", "max_new_tokens", "draft_tokens", "batch_size")
    return {name: getattr(args, name) for name in names}


def _speed(name: str, figures: dict[str, Any]) -> str:
    seconds, rate = figures[f"{name}_seconds"], figures[f"{name}_tokens_per_second"]
    return f"{name}: {seconds:.2f} s, {rate:.1f} tokens/s"


def _write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
