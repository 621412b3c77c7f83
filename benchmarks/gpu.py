"""Everything to know about one GPU in one command; needs torch and the megatron-core wheel only.

    python benchmarks/gpu.py --report gpu.md      # Llama-3.2-1B's dimensions, bf16
    python benchmarks/gpu.py --device cpu --tiny  # does it run at all

Correctness in bf16 and fp32 against the fp32 reference, host synchronisations (none may happen
inside a step); for several vocabularies time and peak memory beside ModelOpt's mathematics before,
after and compiled, and beside the floor that arithmetic gives; a profile. ``--report`` writes all
of it as Markdown and JSON. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.draft_step import build, start_megatron
from benchmarks.gpu_report import Report
from benchmarks.measure import measure
from benchmarks.plain_modelopt import PlainModelOpt
from benchmarks.problem import Problem

LLAMA_1B = Problem(
    hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocab=128256, draft_vocab=128256,
    seq=2048, batch=16, ttt=3, dtype="bf16",
)  # fmt: skip
SMALL = Problem(
    hidden=256, intermediate=512, heads=4, kv_heads=2, vocab=1000, draft_vocab=600, seq=128,
    batch=2, ttt=3, dtype="bf16",
)  # fmt: skip
TINY = dataclasses.replace(SMALL, hidden=64, intermediate=128, seq=32)
Run = tuple[Callable[[], Tensor], list[Tensor]]


def cases_of(problem: Problem) -> dict[str, Problem]:
    """Return the cases of a day: vocabularies of base and draft, and half the tokens masked."""
    small = min(32000, problem.vocab // 4)
    return {
        "whole vocabulary": problem,
        "small draft vocabulary": dataclasses.replace(problem, draft_vocab=small),
        "small vocabularies": dataclasses.replace(problem, vocab=small, draft_vocab=small),
        "half masked": dataclasses.replace(problem, draft_vocab=small, mask_fraction=0.5),
    }


def check_correctness(report: Report, problem: Problem, device: str) -> bool:
    """Compare loss and head gradient in the problem's dtype with the fp32 oracle of the tests."""
    from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

    inputs = problem.inputs()
    config = ReferenceConfig(
        hidden_size=problem.hidden, target_hidden_size=problem.hidden,
        intermediate_size=problem.intermediate, num_heads=problem.heads,
        num_kv_heads=problem.kv_heads, head_dim=problem.head_dim, vocab_size=problem.vocab,
        draft_vocab_size=problem.draft_vocab, num_aux=problem.aux, ttt_steps=problem.ttt,
        rms_eps=1e-5,
    )  # fmt: skip
    reference = ReferenceEagle3(config, inputs.embedding, inputs.vocab_ids)
    reference.load_state_dict(problem.weights(), strict=False)
    logits = inputs.final_hidden @ inputs.output_weight.t()
    loss = reference.forward_ttt(inputs.aux, inputs.tokens, logits, inputs.loss_mask)["loss"]
    loss.backward()
    forward, resting = build(problem, device, {})
    ours = forward()
    ours.backward()
    off = abs(float(ours.detach()) / float(loss.detach()) - 1)
    head = next(x for x in resting if x.shape == reference.lm_head.weight.shape and x.is_leaf)
    assert head.grad is not None and reference.lm_head.weight.grad is not None
    similarity = torch.nn.functional.cosine_similarity(
        head.grad.float().flatten().cpu(), reference.lm_head.weight.grad.flatten(), dim=0
    )
    right = off < 0.01 and float(similarity) > 0.99
    report.say(
        f"correctness in {problem.dtype}",
        right=right, loss_off_by=off, head_gradient_cosine=float(similarity),
    )  # fmt: skip
    return right


def check_no_synchronisation(report: Report, forward: Callable[[], Tensor]) -> None:
    """Run a step that must not ask the device for anything; raise where it does."""
    forward().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report.say("synchronisations", found=0)


def implementations(problem: Problem, device: str) -> dict[str, Callable[[], Run]]:
    from megatron_eagle.kernels.choice import choose_kernels
    from megatron_eagle.platform.compiler import compile_regions

    def ours(compiled: bool, kernels: str = "auto", **options: int) -> Run:
        compile_regions(compiled)
        choose_kernels(kernels)
        return build(problem, device, options)

    def plain(before: bool, compiled: bool) -> Run:
        baseline = PlainModelOpt(problem, device, before, compiled)
        return baseline, baseline.resting

    return {
        "ours": lambda: ours(False),
        "ours, eager passes": lambda: ours(False, kernels="eager"),
        "ours, chunks of 512 MiB": lambda: ours(False, loss_chunk_mib=512),
        "ours, compiled": lambda: ours(True),
        "plain ModelOpt before": lambda: plain(True, False),
        "plain ModelOpt after": lambda: plain(False, False),
        "plain ModelOpt compiled": lambda: plain(False, True),
    }


def compare(
    report: Report, case: str, problem: Problem, *, device: str, iters: int, skip_compiled: bool
) -> bool:
    """Measure time and peak memory of each; a baseline that does not fit gets half the batch, until
    it does, and its time counts per sequence. Returns whether all of them ran."""
    all_ran = True
    for name in implementations(problem, device):
        if skip_compiled and "compiled" in name:
            continue
        size = problem
        while True:
            error: Exception | None = None
            try:
                found = measure(*implementations(size, device)[name](), iters)
            except Exception as raised:  # a compiler that is not there, say: the others still count
                error = raised.with_traceback(None)  # whose frames hold all tensors
            _free(device)
            if size.batch == 1 or not isinstance(error, torch.OutOfMemoryError):
                break
            size = dataclasses.replace(size, batch=size.batch // 2)
        if error is not None:
            failed = f"{type(error).__name__}: {error}"[:300]
            report.say(name, case=case, batch=size.batch, failed=failed)
            all_ran = False
            continue
        per_sequence = found["wall_ms"] / size.batch
        sequence = round(per_sequence, 3)
        report.say(name, case=case, batch=size.batch, wall_ms_per_sequence=sequence, **found)
    return all_ran


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def profile(report: Report, case: str, problem: Problem, device: str) -> None:
    forward, _ = implementations(problem, device)["ours"]()
    forward().backward()
    with torch.profiler.profile() as found:
        forward().backward()
    by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50)
    report.profiles[case] = table
    print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="one GPU: correctness, time, memory, profile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a problem that a CPU can do")
    parser.add_argument("--batch", type=int, help="sequences (16)")
    parser.add_argument("--draft-vocab", type=int, help="one case alone, of this vocabulary")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="write the findings, with JSON"
    )
    parser.add_argument("--skip-compiled", action="store_true", help="nothing by torch.compile")
    parser.add_argument("--iters", type=int, default=10)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"error: --device {args.device}: there is no CUDA device here", file=sys.stderr)
        return 2
    given = {"batch": args.batch, "draft_vocab": args.draft_vocab}
    changes = {name: value for name, value in given.items() if value is not None}
    problem = dataclasses.replace(TINY if args.tiny else LLAMA_1B, **changes)
    with tempfile.TemporaryDirectory() as scratch:
        start_megatron(0, 1, f"{scratch}/store")
        cases = {"one case": problem} if args.draft_vocab else cases_of(problem)
        report = Report(device_name(args.device), versions())
        ok = run_day(report, cases, args)
        torch.distributed.destroy_process_group()
    if args.report is not None:
        report.write(args.report, cases)
    return 0 if ok else 1


def run_day(report: Report, cases: dict[str, Problem], args: argparse.Namespace) -> bool:
    """Run the checks and all ``cases``; returns whether everything ran and was right."""
    small, device = TINY if args.tiny else SMALL, args.device
    right = [
        check_correctness(report, dataclasses.replace(small, dtype=dtype), device)
        for dtype in ("bf16", "fp32")
    ]
    for case, problem in cases.items():
        if device != "cpu":
            check_no_synchronisation(report, build(problem, device, {})[0])
        options = {"device": device, "iters": args.iters, "skip_compiled": args.skip_compiled}
        right.append(compare(report, case, problem, **options))
        _free(device)
    for case in list(cases)[:2]:
        profile(report, case, cases[case], device)
        _free(device)
    return all(right)


def device_name(device: str) -> str:
    """Return what the report calls the device."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the figures depend on."""
    return {name: version(name) for name in ("torch", "megatron-core")}


if __name__ == "__main__":
    sys.exit(main())
