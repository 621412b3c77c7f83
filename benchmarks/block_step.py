"""Forward and backward of a block draft for one sequence: prints one JSON line.

    python benchmarks/block_step.py                                        # DFlash, ours
    python benchmarks/block_step.py --dspark
    .venv-peers/bin/python benchmarks/block_step.py --implementation speculators

The implementations' own training code on the same weights, anchors and outputs of a base. ``loss``
is in our words for both, so that it must agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.block_problem import (
    DECAY,
    BlockProblem,
    add_block_flags,
    block_problem_from,
)
from benchmarks.measure import measure

Built = tuple[Callable[[], Tensor], list[Tensor]]


def ours(problem: BlockProblem, scratch: str) -> Built:
    """Return our forward pass and the tensors at rest, on one gloo rank."""
    from benchmarks.draft_step import start_megatron

    start_megatron(0, 1, f"{scratch}/store")
    from megatron_eagle.objective import block_batch
    from megatron_eagle.objective.block_metrics import BlockSums, divisor
    from tests.helpers.block_case import BlockCase, build_model, shape_of
    from tests.reference.blocks import BlockConfig

    inputs = problem.inputs()
    config = BlockConfig(
        hidden_size=problem.hidden, intermediate_size=problem.intermediate,
        num_heads=problem.heads, num_kv_heads=problem.kv_heads, head_dim=problem.head_dim,
        vocab_size=problem.vocab, draft_vocab_size=problem.vocab, mask_token=problem.mask_token,
        block_size=problem.block, num_layers=problem.layers, num_aux=problem.aux,
        next_token=problem.next_token, markov="vanilla" if problem.next_token else None,
        rank=problem.rank, decay=DECAY, ce=0.0, kl=1.0,
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
    weights = divisor(BlockSums.unpack(model(batch)[1].detach()), model.options.blocks())
    base = model.base
    resting = [*model.parameters(), *model.buffers(), base.embedding_weight, base.output_weight]
    return (lambda: model(batch)[0] / weights), [*resting, case.aux, case.final_hidden]


def speculators(problem: BlockProblem, scratch: str) -> Built:
    """Return the speculators library's, whose masks are dense: there is no GPU for flex."""
    kind = "dspark" if problem.next_token else "dflash"
    core: Any = importlib.import_module(f"speculators.models.{kind}.core")
    backbone: Any = importlib.import_module("speculators.models.dflash.core")
    losses: Any = importlib.import_module("speculators.losses")
    model = _peer_model(problem, kind, core)
    inputs = problem.inputs()
    valid = torch.ones(problem.anchors, dtype=torch.bool)
    backbone.select_anchors = lambda *_: (inputs.anchors, valid)
    config = losses.resolve_loss_config("kl_div", "eager")
    # DSpark's mask is of the token before the one that a slot says.
    mask = inputs.supervised[None].long()
    aux, final, tokens = inputs.aux[None], inputs.final_hidden[None], inputs.tokens[None]
    documents = torch.zeros(1, problem.seq, dtype=torch.long)

    def forward() -> Tensor:
        return model(
            aux, tokens, mask, final, documents, max_anchors=problem.anchors, gamma=DECAY,
            loss_config=config,
        )[1]  # fmt: skip

    return forward, [*model.parameters(), *model.buffers(), aux, final, tokens, mask]


def _peer_model(problem: BlockProblem, kind: str, core: Any) -> Any:
    library: Any = importlib.import_module("speculators")
    module: Any = importlib.import_module(f"speculators.models.{kind}")
    proposals: Any = importlib.import_module("speculators.proposals.greedy")
    transformers: Any = importlib.import_module("transformers")
    layer = transformers.Qwen3Config(
        vocab_size=problem.vocab, hidden_size=problem.hidden, num_hidden_layers=problem.layers,
        intermediate_size=problem.intermediate, num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads, head_dim=problem.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=2 * problem.seq, attention_bias=False,
    )  # fmt: skip
    layer._attn_implementation = "eager"
    name = {"dflash": "DFlash", "dspark": "DSpark"}[kind]
    proposal = proposals.GreedyTokenProposalConfig(speculative_tokens=problem.judged)
    more = {"markov_rank": problem.rank, "enable_confidence_head": False}
    config = getattr(module, f"{name}SpeculatorConfig")(
        transformer_layer_config=layer,
        draft_vocab_size=problem.vocab,
        block_size=problem.block,
        aux_hidden_state_layer_ids=list(range(1, problem.aux + 1)),
        mask_token_id=problem.mask_token,
        sample_from_anchor=problem.next_token,
        **(more if problem.next_token else {}),
        speculators_config=library.SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=library.VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = getattr(core, f"{name}DraftModel")(config).train()
    missing, unexpected = model.load_state_dict(problem.weights(), strict=False)
    if unexpected:
        raise ValueError(f"speculators' draft has other weights: {missing} {unexpected}")
    inputs = problem.inputs()
    model.embed_tokens.weight.data.copy_(inputs.embedding)
    for head in (model.lm_head, model.verifier_lm_head):
        head.weight.data.copy_(inputs.output_weight)
        head.weight.requires_grad_(False)
    model.embed_tokens.weight.requires_grad_(False)
    model.verifier_norm.weight.data.fill_(1.0)
    return model


IMPLEMENTATIONS = {"ours": ours, "speculators": speculators}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="ours")
    parser.add_argument("--iters", type=int, default=5)
    add_block_flags(parser)
    args = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    problem = block_problem_from(args)
    with tempfile.TemporaryDirectory() as scratch:
        forward, resting = IMPLEMENTATIONS[args.implementation](problem, scratch)
        line: dict[str, Any] = measure(forward, resting, args.iters)
        if args.implementation != "ours":
            line["loss"] = problem.in_our_words(line["loss"])
        print(json.dumps({"implementation": args.implementation, **line}), flush=True)


if __name__ == "__main__":
    main()
