"""Tiny models that Megatron's own trainer trains and saves, as bases, and what they compute.

``pretrain_gpt.py`` beside this file is the training script.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.e2e.launch import ROOT, launch
from tests.helpers.native_files import BRIDGE_LLAMA
from tests.helpers.tiny_hf import SIZES

SCRIPT = ROOT / "tests" / "helpers" / "pretrain_gpt.py"
VOCAB = SIZES["vocab_size"]
COMMON: list[object] = [
    *("--num-layers", 8, "--hidden-size", 32, "--ffn-hidden-size", 48),
    *("--num-attention-heads", 4, "--max-position-embeddings", 64, "--seq-length", 32),
    *("--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 4),
    *("--lr", "2e-2", "--lr-decay-style", "constant", "--weight-decay", 0, "--seed", 5),
    *(
        "--save-interval",
        4,
        "--eval-iters",
        0,
        "--eval-interval",
        100,
        "--num-workers",
        0,
        "--log-interval",
        1,
    ),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB),
    *("--make-vocab-size-divisible-by", 4, "--distributed-backend", "gloo"),
    *("--transformer-impl", "local", "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion"),
    *("--no-bias-dropout-fusion", "--disable-jit-fuser", "--no-persist-layer-norm"),
    *("--no-rope-fusion", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist"),
    *("--attention-dropout", 0, "--hidden-dropout", 0, "--init-method-std", 0.2),
]
ROPE = ["--position-embedding-type", "rope", "--disable-bias-linear", "--normalization", "RMSNorm"]
UNTIED = "--untie-embeddings-and-output-weights"
LLAMA = [*ROPE, "--swiglu", UNTIED, "--group-query-attention", "--num-query-groups", 2]
TENSOR, PIPELINE = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
EXPERT = ["--expert-model-parallel-size", 2, "--moe-token-dispatcher-type", "alltoall"]
EXPERTS = ["--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", 24]

ATTENTION, MATRIX = {"n_heads_in_group": 2}, {"replace_with_linear": True}
NOTHING = {"no_op": True}
PARTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (ATTENTION, {"ffn_hidden_size": 64}),
    (NOTHING, {"ffn_hidden_size": 48}),
    (MATRIX, {"ffn_mult": 1.5}),
    (ATTENTION, MATRIX),
    (NOTHING, NOTHING),
    (ATTENTION, NOTHING),
    (MATRIX, MATRIX),
    (ATTENTION, {"ffn_hidden_size": None}),
]
"""Attention and MLP of each layer of a heterogeneous model."""
BLOCKS: dict[str, Any] = {
    "hidden_act": "silu",
    "num_hidden_layers": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 8.0},
    "block_configs": [
        {
            "attention": {"n_heads_in_group": None, **attention},
            "ffn": mlp if "ffn_hidden_size" in mlp else {"ffn_mult": None, **mlp},
        }
        for attention, mlp in PARTS
    ],
}
"""Those layers as the config.json of a Llama-Nemotron model has them, with what Megatron reads."""

BRIDGE: dict[str, Any] = {
    **BRIDGE_LLAMA,
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "num_layers": 8,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "rotary_base": 10000,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 4,
}
"""The ``llama`` of FAMILIES in the fields of Megatron-Bridge's provider."""

FAMILIES: dict[str, list[object]] = {
    "llama": [*LLAMA, *TENSOR],
    "gpt2": [*PIPELINE],
    "nemotron": [
        *("--position-embedding-type", "rope", "--rotary-percent", 0.5, "--disable-bias-linear"),
        *("--squared-relu", "--no-bias-gelu-fusion", "--apply-layernorm-1p", UNTIED, *PIPELINE),
    ],
    "interleaved": [
        *LLAMA, "--rotary-interleaved", "--qk-layernorm", "--add-qkv-bias", "--window-size", "4,0",
        *("--window-attn-skip-freq", 2, "--softmax-type", "learnable", *TENSOR),
    ],
    "no_positions": [*ROPE, "--position-embedding-type", "none", "--swiglu", *PIPELINE],
    "scaled_rope": [*LLAMA, "--use-rope-scaling", "--no-rope-freq", 4, *TENSOR],
    "yarn": [
        *LLAMA, "--position-embedding-type", "yarn", "--rotary-scaling-factor", 4,
        *("--yarn-original-max-position-embeddings", 16, "--mscale", 0.7, *PIPELINE),
    ],
    "mixtral": [*LLAMA, *EXPERTS, *EXPERT],
    "deepseek": [
        *ROPE, "--swiglu", UNTIED, "--multi-latent-attention", "--qk-layernorm",
        *("--q-lora-rank", 16, "--kv-lora-rank", 8, "--qk-head-dim", 8),
        *("--qk-pos-emb-head-dim", 4, "--v-head-dim", 8, *EXPERTS),
        *("--moe-layer-freq", "[0,1,1,1,1,1,1,1]", "--moe-shared-expert-intermediate-size", 16),
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
        *("--moe-router-num-groups", 2, "--moe-router-group-topk", 1, *PIPELINE),
        *("--rotary-scaling-factor", 4, "--mscale-all-dim", 0.8, "--moe-router-dtype", "fp32"),
        *("--moe-aux-loss-coeff", 0, "--moe-router-topk-scaling-factor", 1.5),
    ],
    "hybrid": [*LLAMA, *EXPERTS, *EXPERT, "--hybrid-layer-pattern=*-*E*-"],
    "delta_net": [
        *ROPE, "--swiglu", *PIPELINE, *EXPERTS, "--hybrid-layer-pattern=G-*-|GE*-",
        *("--linear-key-head-dim", 8, "--linear-value-head-dim", 8, "--linear-num-key-heads", 2),
        *("--linear-num-value-heads", 4, "--linear-conv-kernel-dim", 3),
        *("--moe-aux-loss-coeff", 0),
    ],
    "latent_hybrid": [
        *ROPE, "--swiglu", UNTIED, "--hybrid-layer-pattern=+-|+E", *EXPERTS, *PIPELINE,
        *("--q-lora-rank", 16, "--kv-lora-rank", 8, "--qk-head-dim", 8),
        *("--qk-pos-emb-head-dim", 4, "--v-head-dim", 8),
        *("--rotary-scaling-factor", 4, "--mscale-all-dim", 0.8, "--multi-latent-attention"),
    ],
    "heterogeneous": [
        *LLAMA, "--use-rope-scaling", "--use-rotary-position-embeddings", *TENSOR,
        *("--heterogeneous-layers-config-path", ""),
        *("--heterogeneous-layers-config-encoded-json", json.dumps(BLOCKS)),
    ],
    "mtp": [*LLAMA, "--mtp-num-layers", 1],
}  # fmt: skip
"""Flags of each model and of the layout of two ranks (``mtp``: one) that trains it."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint that Megatron saved, and what the model in memory computed.

    ``tokens`` [2, 24]; ``logits`` [2, 24, V]; ``layers``: each layer's output [24, 2, H].
    """

    directory: Path
    tokens: torch.Tensor
    logits: torch.Tensor
    layers: dict[int, torch.Tensor]


def pretrain(family: str, folder: Path, *flags: object) -> Trained:
    """Train a model of ``family`` and save it with its optimizer to ``folder``/base."""
    ranks = 1 if family == "mtp" else 2
    folder.mkdir(exist_ok=True)
    words = [*COMMON, *FAMILIES[family], *flags, "--save", folder / "base"]
    run = launch(SCRIPT, ranks, "--reference", folder / "reference", *words)
    assert run.returncode == 0, run.output[-4000:]
    parts: list[dict[str, Any]] = [
        torch.load(file, weights_only=True) for file in sorted(folder.glob("reference.*"))
    ]
    layers = {i: hidden for part in parts for i, hidden in part["layers"].items()}
    (logits,) = [part["logits"] for part in parts if "logits" in part][:1]
    return Trained(folder / "base", parts[0]["tokens"], logits, layers)
