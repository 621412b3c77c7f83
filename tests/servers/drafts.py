"""Tiny bases and drafts of every kind, trained on the bases' own answers, for real engines to run.

Head sizes are some that vLLM's CPU kernels have. MLA is not among the kinds: beside a tiny
DeepSeek-V3, vLLM 0.32.0's CPU build gives other tokens than transformers, and others again with a
draft than without.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.formats import FORMATS
from tests.e2e.launch import ROOT, launch, train
from tests.helpers.tiny_hf import make_base

VOCABULARY, MAX_TOKENS, DRAFT_TOKENS = 257, 24, 3
MASK = 256
"""A token that no prompt has and no base says."""
ITERATIONS = 240
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "qwen3": ("qwen3", {}),
}


@dataclass(frozen=True)
class Kind:
    """A kind of draft: its base, its flags, its format, and what vLLM must be told of it."""

    base: str = "llama"
    flags: tuple[object, ...] = ()
    fmt: str = "hf"
    method: str = "eagle3"
    speculative: dict[str, Any] = field(default_factory=dict)


COMPRESSED = ("--eagle-draft-vocab-size", 120)
START = ("--eagle-init-from-base",)
HEADS = (
    *("--eagle-num-attention-heads", 2, "--eagle-num-query-groups", 1),
    *("--eagle-kv-channels", 64),
)
NORMS = ("--eagle-norm-before-fc", "--eagle-norm-before-residual")
DFLASH = (
    *("--eagle-algorithm", "dflash", "--eagle-block-size", 1 + DRAFT_TOKENS),
    *("--eagle-mask-token", MASK, "--eagle-anchors", 8, "--eagle-aux-layers", 1, 3, 5),
)
KINDS: dict[str, Kind] = {
    "one-layer": Kind(flags=(*COMPRESSED, *START)),
    "speculators": Kind(flags=(*COMPRESSED, *START), fmt="speculators"),
    "two-layers-whole-vocabulary": Kind(flags=("--eagle-num-layers", 2, *START)),
    "own-head-size": Kind(flags=(*HEADS, *COMPRESSED)),
    "llama3-rope": Kind("llama3-rope", START),
    "linear-rope": Kind("linear-rope", START),
    "eagle3.1": Kind(flags=("--eagle-algorithm", "eagle3.1", *START)),
    "norms": Kind(flags=(*NORMS, *START), fmt="vllm"),
    "eagle1": Kind(flags=("--eagle-algorithm", "eagle1"), fmt="vllm", method="eagle"),
    "p-eagle": Kind(
        flags=("--eagle-algorithm", "p-eagle", "--eagle-mask-token", MASK, *START),
        fmt="vllm",
        speculative={"parallel_drafting": True},
    ),
    "qk-norm": Kind("qwen3", ("--eagle-qk-layernorm", *COMPRESSED, *START), "vllm"),
    "dflash": Kind("qwen3", (*DFLASH, "--eagle-num-layers", 2), method="dflash"),
    "dflash-compressed": Kind(
        flags=(*DFLASH, "--eagle-num-layers", 1, *COMPRESSED), fmt="vllm", method="dflash"
    ),
}


@dataclass(frozen=True)
class Base:
    """A base's Hugging Face directory and checkpoint, its answers and what it is asked."""

    hf: Path
    checkpoint: Path
    answers: Path
    prompts: Path
    prompt_ids: list[list[int]]
    stops: list[int]


def make(folder: Path, name: str) -> Base:
    """Make a base, let it answer 60 random prompts, every fifth of which is asked later, and call
    tokens of its answers end tokens."""
    family, fields = BASES[name]
    model = make_base(folder / "hf", family, **{**SIZES, **fields})
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK].zero_()
    model.save_pretrained(folder / "hf")
    rng = random.Random(5)
    prompts, answers = [], []
    for length in (3, 6, 9):
        group = [[rng.randrange(MASK) for _ in range(length)] for _ in range(20)]
        prompts += group
        answers += _greedy(model, group, MAX_TOKENS)
    stops = _ends(answers[::5], 3)
    for file in ("config.json", "generation_config.json"):
        path = folder / "hf" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stops}))
    _write_tokenizer(folder / "hf")
    import_base(folder / "hf", folder / "base")
    records = [
        {"prompt_ids": prompt, "answer_ids": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    asked = prompts[::5]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in asked)
    )
    return Base(
        folder / "hf", folder / "base", folder / "answers.jsonl", folder / "prompts.jsonl",
        asked, stops,
    )  # fmt: skip


def _ends(answers: list[list[int]], count: int) -> list[int]:
    """The tokens that end most answers after 8 tokens: there, chains run past the ends."""
    ends: list[int] = []
    for _ in range(count):
        whole = [answer for answer in answers if not set(answer) & set(ends)]
        seen = Counter(token for answer in whole for token in set(answer[8:]) - set(answer[:8]))
        ends.append(seen.most_common(1)[0][0])
    return ends


def _write_tokenizer(directory: Path) -> None:
    """Byte-level, without merges: OpenVINO's pipeline does not start without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    inner = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(directory)


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Answers to prompts of one length."""
    ids = torch.tensor(prompts)
    for _ in range(count):
        best = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids[:, -count:].tolist()


def trained(folder: Path, kind: Kind, base: Base, end: float) -> tuple[Path, dict[str, Any]]:
    """Train the draft, convert it and decode with it: its directory and our figures.

    Each launch may take until ``end``, on ``time.monotonic``.
    """
    run = train(
        1, folder / "log.jsonl", "--eagle-base-checkpoint", base.checkpoint,
        "--eagle-train-data", base.answers, "--eagle-ttt-steps", DRAFT_TOKENS,
        "--train-iters", ITERATIONS, "--lr", "4e-3",
        "--save", folder / "draft", "--save-interval", ITERATIONS, *kind.flags,
        launcher=partial(launch, timeout=end - time.monotonic()),
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    export_draft(folder / "draft", folder / "hf", fmt=FORMATS[kind.fmt])
    figures = folder / "figures.json"
    run = launch(
        ROOT / "tools" / "eval_acceptance.py", 1, "--base", base.checkpoint,
        "--draft", folder / "draft", "--prompts", base.prompts, "--output", figures,
        "--max-new-tokens", MAX_TOKENS, "--draft-tokens", DRAFT_TOKENS,
        timeout=end - time.monotonic(),
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    return folder / "hf", json.loads(figures.read_text())
