"""vLLM speculators' EAGLE-3 draft model, eager losses, dense masks (there is no GPU for flex).

Its batch is one packed sequence; sequences are documents. Of a document's end some rows are judged
by the next document's start, as its code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem

DECAY = 0.8


def build(problem: Problem, variant: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """``variant`` is unused. (forward, tensors at rest)."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layer = LlamaConfig(
        vocab_size=problem.vocab, hidden_size=problem.hidden, num_hidden_layers=1,
        intermediate_size=problem.intermediate, num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads, head_dim=problem.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=2 * problem.seq, attention_bias=False,
    )  # fmt: skip
    layer._attn_implementation = "sdpa"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=problem.draft_vocab,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=problem.ttt)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model: Any = Eagle3DraftModel(config).train()
    inputs = problem.inputs()
    _load(model, problem, inputs)
    loss_config = resolve_loss_config("kl_div", "eager")

    def packed(x: Tensor) -> Tensor:
        return x.flatten(0, 1).unsqueeze(0).contiguous()

    length = problem.seq - 1
    documents = torch.arange(problem.batch).repeat_interleave(length).unsqueeze(0)
    positions = (1 + torch.arange(length)).repeat(problem.batch).unsqueeze(0)
    aux, final = packed(inputs.aux[:, :-1]), packed(inputs.final_hidden[:, 1:])
    tokens, mask = packed(inputs.tokens[:, 1:]), packed(inputs.loss_mask[:, :-1])

    def forward() -> Tensor:
        return model(
            aux, tokens, documents, loss_mask=mask, position_ids=positions,
            verifier_last_hidden_states=final, ttt_steps=problem.ttt,
            ttt_step_loss_decay=DECAY, loss_config=loss_config,
        )[1]  # fmt: skip

    return forward, [*model.parameters(), *model.buffers(), aux, final, tokens, mask]


def loss_offset(problem: Problem) -> float:
    """Return what our loss has and the Kullback-Leibler divergence lacks: the teacher's entropy, of
    each step's rows, step-weighted. One sequence, fully supervised."""
    inputs = problem.inputs()
    logits = inputs.final_hidden[0] @ inputs.output_weight[inputs.vocab_ids].t()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return float(sum(DECAY**step * entropy[1 + step :].mean() for step in range(problem.ttt)))


def _load(model: Any, problem: Problem, inputs: Any) -> None:
    weights = {k.replace("midlayer.", "layers.0."): v for k, v in problem.weights().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise ValueError(f"speculators' draft has other weights: {missing} {unexpected}")
    model.embed_tokens.weight.data.copy_(inputs.embedding)
    model.verifier_lm_head.weight.data.copy_(inputs.output_weight[inputs.vocab_ids])
    model.verifier_norm.weight.data.fill_(1.0)
    model.lm_head.weight.requires_grad_(True)
    if problem.draft_vocab < problem.vocab:
        model.t2d.zero_()
        model.t2d[inputs.vocab_ids] = True
        model.d2t.copy_(inputs.vocab_ids - torch.arange(problem.draft_vocab))
