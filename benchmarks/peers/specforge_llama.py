"""SpecForge's online EAGLE-3 model with its SDPA attention.

Its loss is a Triton kernel; without a GPU its own reference implementation takes the place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem


def build(problem: Problem, variant: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """``variant`` is unused. (forward, tensors at rest)."""
    import specforge.algorithms.eagle3.model as eagle3
    from specforge.core.loss import _compute_loss
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    if not torch.cuda.is_available():

        class PlainLoss:
            apply = staticmethod(_compute_loss)

        eagle3.LogSoftmaxLoss = PlainLoss
    config = LlamaConfig(
        vocab_size=problem.vocab, hidden_size=problem.hidden, num_hidden_layers=1,
        intermediate_size=problem.intermediate, num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads, head_dim=problem.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=2 * problem.seq, pad_token_id=0, attention_bias=False,
    )  # fmt: skip
    config.draft_vocab_size, config.target_hidden_size = problem.draft_vocab, problem.hidden
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    inputs = problem.inputs()
    _load(draft, problem, inputs)
    model: Any = eagle3.OnlineEagle3Model(draft, length=problem.ttt, attention_backend="sdpa")
    model.train()
    # Row p consumes x_{p+1} and is judged by z_{p+1}; the last row has neither.
    target = _shifted(inputs.final_hidden @ inputs.output_weight.t())
    mask, tokens = inputs.loss_mask.clone(), _shifted(inputs.tokens)
    mask[:, -1] = 0
    rows = inputs.loss_mask[:, :-1].sum()

    def forward() -> Tensor:
        losses = model(
            input_ids=tokens, attention_mask=None, target=target,
            loss_mask=mask.unsqueeze(-1), hidden_states=inputs.aux,
        )[0]  # fmt: skip
        # Theirs is a mean over all rows, supervised or not.
        return sum(0.8**t * loss for t, loss in enumerate(losses)) * (mask.numel() / rows)

    return forward, [*draft.parameters(), *draft.buffers(), target, inputs.aux, tokens, mask]


def _load(draft: Any, problem: Problem, inputs: Any) -> None:
    missing, unexpected = draft.load_state_dict(problem.weights(), strict=False)
    allowed = {"t2d", "d2t", "embed_tokens.weight"}
    if unexpected or {name for name in missing if "rotary" not in name} - allowed:
        raise ValueError(f"SpecForge's draft has other weights: {missing} {unexpected}")
    draft.embed_tokens.weight.data.copy_(inputs.embedding)
    draft.embed_tokens.weight.requires_grad_(False)
    draft.t2d.zero_()
    draft.t2d[inputs.vocab_ids] = True
    draft.d2t.copy_(inputs.vocab_ids - torch.arange(problem.draft_vocab))


def _shifted(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1).contiguous()
