"""The measured work: sizes, and the weights and inputs that every implementation is given.

Only PyTorch is needed here, so peers read it in their own environment.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """Forward and backward of an EAGLE-3 draft for one micro-batch, the base's forward excluded."""

    hidden: int = 256
    intermediate: int = 1024
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 32000
    draft_vocab: int = 32000
    seq: int = 512
    batch: int = 2
    ttt: int = 3
    dtype: str = "fp32"
    mask_fraction: float = 0.0
    aux: int = 3
    documents: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def positions(self) -> Tensor | None:
        """Return the positions [B, S] of ``documents`` packed into each sequence; None for one."""
        if self.documents == 1:
            return None
        cuts = [round(i * self.seq / self.documents) for i in range(self.documents + 1)]
        lengths = [stop - start for start, stop in pairwise(cuts)]
        return torch.cat([torch.arange(n) for n in lengths]).expand(self.batch, -1).clone()

    # Cached: benchmarks/gpu.py builds many variants, and its numbers take seconds to draw.
    @lru_cache(maxsize=1)  # noqa: B019
    def weights(self) -> dict[str, Tensor]:
        """fp32, named as in EAGLE-3's Hugging Face files; not to be written to."""
        generator = torch.Generator().manual_seed(0)
        size, kv = self.hidden, self.kv_heads * self.head_dim
        shapes = {
            "fc.weight": (size, self.aux * size),
            "midlayer.self_attn.q_proj.weight": (size, 2 * size),
            "midlayer.self_attn.k_proj.weight": (kv, 2 * size),
            "midlayer.self_attn.v_proj.weight": (kv, 2 * size),
            "midlayer.self_attn.o_proj.weight": (size, size),
            "midlayer.mlp.gate_proj.weight": (self.intermediate, size),
            "midlayer.mlp.up_proj.weight": (self.intermediate, size),
            "midlayer.mlp.down_proj.weight": (size, self.intermediate),
            "lm_head.weight": (self.draft_vocab, size),
        }
        weights = {
            name: torch.randn(shape, generator=generator) * shape[1] ** -0.5
            for name, shape in shapes.items()
        }
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        weights |= {f"midlayer.{name}.weight": torch.ones(size) for name in norms}
        weights["norm.weight"] = torch.ones(size)
        return weights

    @lru_cache(maxsize=1)  # noqa: B019
    def inputs(self) -> Inputs:
        """Make the base's outputs, fp32; the first ``mask_fraction`` of a sequence is a prompt.
        Not to be written to."""
        generator = torch.Generator().manual_seed(1)
        size = self.hidden

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        mask = torch.ones(self.batch, self.seq)
        mask[:, : round(self.mask_fraction * self.seq)] = 0.0
        ids = torch.randperm(self.vocab, generator=generator)[: self.draft_vocab]
        return Inputs(
            tokens=torch.randint(self.vocab, (self.batch, self.seq), generator=generator),
            loss_mask=mask,
            aux=normal(self.batch, self.seq, self.aux * size),
            # Of RMS 1, as a norm leaves it: some peers apply one.
            final_hidden=torch.nn.functional.rms_norm(normal(self.batch, self.seq, size), (size,)),
            embedding=normal(self.vocab, size),
            output_weight=normal(self.vocab, size) * 2 * size**-0.5,
            vocab_ids=ids.sort().values,
        )


@dataclass(frozen=True)
class Inputs:
    """tokens, loss_mask [B, S] (entry i: is x_{i+1} supervised); aux [B, S, A * H] and final_hidden
    [B, S, H] of the base, its embedding and output_weight [V, H]; vocab_ids [D]."""

    tokens: Tensor
    loss_mask: Tensor
    aux: Tensor
    final_hidden: Tensor
    embedding: Tensor
    output_weight: Tensor
    vocab_ids: Tensor


_M = Problem(hidden=1024, intermediate=4096, heads=16, kv_heads=8, batch=1, seq=1024)
SIZES = {
    "S": Problem(),
    "S-half-masked": Problem(mask_fraction=0.5),
    "S-D8000": Problem(vocab=8000, draft_vocab=8000),
    "S-V32000-D8000": Problem(draft_vocab=8000),
    "S-K7": Problem(ttt=7),
    "M": _M,
    "M-D8000": dataclasses.replace(_M, draft_vocab=8000),
    "M-D8000-60-masked": dataclasses.replace(_M, draft_vocab=8000, mask_fraction=0.6),
    "attention-2048": Problem(vocab=1000, draft_vocab=1000, batch=1, seq=2048),
}


def add_problem_flags(parser: argparse.ArgumentParser) -> None:
    """``--size NAME`` picks a row of ``SIZES``; every field of :class:`Problem` is a flag too."""
    parser.add_argument("--size", choices=SIZES, default="S", help="where the other flags start")
    for field in dataclasses.fields(Problem):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        choices = tuple(DTYPES) if field.name == "dtype" else None
        parser.add_argument(flag, type=kind, choices=choices, help=f"S: {field.default}")


def problem_from(args: argparse.Namespace) -> Problem:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Problem)}
    changes = {name: value for name, value in given.items() if value is not None}
    if "vocab" in changes and "draft_vocab" not in changes:
        changes["draft_vocab"] = changes["vocab"]
    return dataclasses.replace(SIZES[args.size], **changes)
