"""Forward and backward of a block draft for one sequence: prints JSON lines.

    python benchmarks/block_step.py                                        # DFlash, ours
    python benchmarks/block_step.py --dspark --hidden 1024 --heads 16 --kv-heads 8
    .venv-peers/bin/python benchmarks/block_step.py --implementation specforge --loss ce

The implementations' own training code on the same weights, anchors and outputs of a base. One line
has memory and loss, which is in our words for all, so that it must agree; one the times of each
step. With --turns a step is run for each line of the input: benchmarks/block_compare.py lets all
implementations take turns.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.block_problem import DECAY, BlockProblem, add_block_flags, block_problem_from
from benchmarks.measure import Step

if TYPE_CHECKING:  # only our own step imports Megatron
    from megatron_eagle.model import EagleGPTModel
    from megatron_eagle.objective.block_batch import BlockBatch

PEERS = {
    "speculators": "speculators_blocks",
    "specforge": "specforge_blocks",
    "automodel": "automodel_blocks",
}
"""Modules of benchmarks/peers."""
WARMUP = 2


class BlockStep:
    """The forward pass of one sequence on one rank; call it for the loss."""

    def __init__(self, model: EagleGPTModel, batch: BlockBatch) -> None:
        from megatron_eagle.objective.block_metrics import BlockSums, divisor

        self.model, self.batch = model, batch
        self.divisor = divisor(BlockSums.unpack(model(batch)[1].detach()), model.options.blocks())

    def __call__(self) -> Tensor:
        return self.model(self.batch)[0] / self.divisor


def build(problem: BlockProblem) -> tuple[BlockStep, list[Tensor]]:
    """Build our forward pass on this rank; return it and the tensors at rest.

    The anchors are the problem's in place of those that training draws.
    """
    from megatron_eagle.objective import block_batch
    from tests.helpers.block_case import BlockCase, build_model, shape_of
    from tests.reference.blocks import BlockConfig

    inputs = problem.inputs()
    ce, kl, l1 = problem.loss_weights
    config = BlockConfig(
        hidden_size=problem.hidden, intermediate_size=problem.intermediate,
        num_heads=problem.heads, num_kv_heads=problem.kv_heads, head_dim=problem.head_dim,
        vocab_size=problem.vocab, draft_vocab_size=problem.vocab, mask_token=problem.mask_token,
        block_size=problem.block, num_layers=problem.layers, num_aux=problem.aux,
        next_token=problem.next_token, markov="vanilla" if problem.next_token else None,
        rank=problem.rank, decay=DECAY, ce=ce, kl=kl, l1=l1,
        counts_data=problem.loss == "ce",  # as the peers' accuracy does
    )  # fmt: skip
    # Entry i of our mask is of the next token.
    mask = torch.cat([inputs.supervised[1:], torch.zeros(1)])[None]
    case = BlockCase(
        config, problem.weights(), torch.arange(problem.vocab), inputs.embedding,
        inputs.output_weight, inputs.aux[None], inputs.final_hidden[None], inputs.tokens[None],
        mask, anchors=problem.anchors,
    )  # fmt: skip
    model = build_model(case)
    with mock.patch.object(block_batch, "draw_anchors", lambda *_: inputs.anchors):
        batch = block_batch.BlockBatch.build(
            case.tokens, mask, range(1), shape_of(config), anchors=problem.anchors, seed=0
        )
    base = model.base
    shared = [base.embedding_weight, base.output_weight, case.aux, case.final_hidden]
    return BlockStep(model, batch), [*model.parameters(), *model.buffers(), *shared]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", choices=("ours", *PEERS), default="ours")
    parser.add_argument("--iters", type=int, default=5, help="steps")
    parser.add_argument("--turns", action="store_true", help="as many steps as lines are read")
    add_block_flags(parser)
    args = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    problem = block_problem_from(args)
    with tempfile.TemporaryDirectory() as scratch:
        if args.implementation == "ours":
            from benchmarks.draft_step import restart_with_recommended_environment, start_megatron

            restart_with_recommended_environment(1)
            start_megatron(0, 1, f"{scratch}/store")
            step = Step(*build(problem))
        else:
            peer: Any = importlib.import_module(f"benchmarks.peers.{PEERS[args.implementation]}")
            step = Step(*peer.build(problem))
        loss = [float(step.run()) for _ in range(WARMUP)][-1]
        if args.implementation != "ours" and problem.loss == "kl":
            loss = problem.in_our_words(loss)
        say({"implementation": args.implementation, "loss": loss, **step.memory()})
        for _ in sys.stdin if args.turns else range(args.iters):
            say(step.timed())
        if args.implementation == "ours":
            torch.distributed.destroy_process_group()


def say(line: dict[str, Any]) -> None:
    """Print ``line`` as JSON."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
