"""NVIDIA ModelOpt's EAGLE-3 for Hugging Face models: eager, compiled, and as it was before.

*before*: softmax and argmax of the base's logits in every step's loss, and the host asked for each
step's accuracy, as ModelOpt did until its own optimisation of EAGLE training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Inputs, Problem

DECAY = 0.8


def build(problem: Problem, variant: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """``variant``: before, eager or compiled. (forward, tensors at rest)."""
    import modelopt.torch.speculative as mtsp
    from transformers import LlamaConfig, LlamaForCausalLM

    inputs = problem.inputs()
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=problem.vocab, hidden_size=problem.hidden, num_hidden_layers=1,
            intermediate_size=64, num_attention_heads=problem.heads, head_dim=problem.head_dim,
            max_position_embeddings=2 * problem.seq, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    architecture = {
        "num_hidden_layers": 1, "intermediate_size": problem.intermediate,
        "num_attention_heads": problem.heads, "num_key_value_heads": problem.kv_heads,
        "head_dim": problem.head_dim, "draft_vocab_size": problem.draft_vocab,
        "use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "use_last_layernorm": True, "has_lm_head": True, "torch_dtype": "float32",
    }  # fmt: skip
    options = {
        "eagle_decoder_type": "llama", "eagle_offline": True, "eagle_ttt_steps": problem.ttt,
        "eagle_loss_decay_factor": DECAY, "eagle_use_torch_compile": variant == "compiled",
        "eagle_architecture_config": _with_defaults(architecture),
    }  # fmt: skip
    mtsp.convert(base, [("eagle", options)])
    model: Any = base.train()
    _load(model, problem, inputs)
    if variant == "before":
        _undo_optimisation(model)
    logits = inputs.final_hidden @ inputs.output_weight.t()
    outputs = {
        "base_model_hidden_states": inputs.final_hidden,
        "aux_hidden_states": inputs.aux,
        "base_model_logits": logits,
    }
    token_mask = inputs.loss_mask.roll(1, 1)  # theirs is aligned with tokens, ours with labels
    token_mask[:, 0] = 0

    def forward() -> Tensor:
        return model(inputs.tokens, loss_mask=token_mask, base_model_outputs=outputs).loss

    return forward, [*model.parameters(), *model.buffers(), *outputs.values(), inputs.tokens]


def _with_defaults(architecture: dict[str, Any]) -> dict[str, Any]:
    from modelopt.torch.speculative.eagle.default_config import default_eagle_config

    return {**default_eagle_config, **architecture}


def _load(model: Any, problem: Problem, inputs: Inputs) -> None:
    renamed = {name.replace("midlayer.", "layers.0."): x for name, x in problem.weights().items()}
    missing, unexpected = model.eagle_module.load_state_dict(renamed, strict=False)
    if unexpected or [name for name in missing if name != "d2t"]:
        raise ValueError(f"ModelOpt's draft has other weights: {missing} {unexpected}")
    if problem.draft_vocab < problem.vocab:
        model.eagle_module.d2t.copy_(inputs.vocab_ids - torch.arange(problem.draft_vocab))
    model._base_model_embeddings.weight.data.copy_(inputs.embedding)


def _undo_optimisation(model: Any) -> None:
    prepare, loss = model._prepare_eagle_inputs, model._eagle_loss

    def unprepared(*args: Any, **kwargs: Any) -> Any:
        outputs = args[4] if len(args) > 4 else kwargs["base_outputs"]
        logits = outputs.logits
        if problem_is_compressed(model):
            logits = model._map_logits_to_draft_vocab(logits)
        softmax = torch.softmax
        torch.softmax = lambda x, *_, **__: x  # type: ignore[assignment]
        try:
            prepared = prepare(*args, **kwargs)
        finally:
            torch.softmax = softmax
        return *prepared[:-2], logits, logits

    def eager_loss(logits: Tensor, same: Tensor, draft: Tensor, mask: Tensor) -> Any:
        found, accuracy = loss(logits.softmax(2), logits.argmax(-1), draft, mask)
        return found, accuracy.item()

    model._prepare_eagle_inputs, model._eagle_loss = unprepared, eager_loss


def problem_is_compressed(model: Any) -> bool:
    return model.eagle_config.draft_vocab_size != model.eagle_config.vocab_size
