"""What the peers' drafts of blocks have in common: Qwen3 layers, DFlash's names of weights."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from benchmarks.block_problem import BlockInputs, BlockProblem


def layer_config(problem: BlockProblem) -> Any:
    """Return Hugging Face's Qwen3 configuration of the draft's layers, with SDPA."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.Qwen3Config(
        vocab_size=problem.vocab, hidden_size=problem.hidden, num_hidden_layers=problem.layers,
        intermediate_size=problem.intermediate, num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads, head_dim=problem.head_dim, rms_norm_eps=1e-5,
        max_position_embeddings=2 * problem.seq, attention_bias=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def draft_config(problem: BlockProblem) -> Any:
    """Return :func:`layer_config` with DFlash's fields."""
    config = layer_config(problem)
    config.block_size, config.mask_token_id = problem.block, problem.mask_token
    config.num_target_layers = 2 * problem.aux + 4
    config.target_layer_ids = list(range(1, problem.aux + 1))
    config.dflash_config = {
        "target_layer_ids": config.target_layer_ids, "mask_token_id": problem.mask_token,
    }  # fmt: skip
    return config


def load_draft(draft: Any, problem: BlockProblem, of_base: tuple[str, ...] = ()) -> None:
    """Load the problem's weights into a peer's ``draft``, all but those that begin as ``of_base``.

    Raises:
        ValueError: the draft has others.
    """
    missing, unexpected = draft.load_state_dict(problem.weights(), strict=False)
    if unexpected or not all(name.startswith(of_base) for name in missing):
        raise ValueError(f"the peer's draft has other weights: {missing} {unexpected}")


def base_modules(inputs: BlockInputs) -> tuple[nn.Embedding, nn.Linear]:
    """Return the base's embedding and output layer, frozen."""
    vocab, size = inputs.embedding.shape
    embedding, head = nn.Embedding(vocab, size), nn.Linear(size, vocab, bias=False)
    embedding.weight.data, head.weight.data = inputs.embedding, inputs.output_weight
    return embedding.requires_grad_(False), head.requires_grad_(False)
