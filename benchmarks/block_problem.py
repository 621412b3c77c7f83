"""The measured work of a block draft: sizes, and what every implementation is given.

Only PyTorch is needed here, so peers read it in their own environment. One sequence, in which
prompts and answers take turns. The number of blocks does not depend on the mask, which says where
they begin: one long prompt is context and no more, while in a chat of short answers blocks run past
the end of theirs, and what they draft there nothing judges. The loss of slot t has weight
exp(-t / 4).
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

DECAY = 4.0
LOSSES = {"kl": (0.0, 1.0, 0.0), "ce": (1.0, 0.0, 0.0), "ce-l1": (0.1, 0.0, 0.9)}
"""Weights of the cross-entropy with the data's tokens, of the one with the base's distribution, and
of the L1 distance from it: soft labels, DFlash's published loss, and DSpark's."""


@dataclass(frozen=True)
class BlockProblem:
    """Forward and backward of a block draft for one sequence, the base's forward excluded.

    ``next_token``: DSpark's slots, with a vanilla Markov head and no confidence head; otherwise
    DFlash's. ``loss``: a name of LOSSES. ``mask_fraction`` of the sequence are prompts, each before
    an answer of ``answer`` tokens; 0: one prompt, one answer.
    """

    next_token: bool = False
    loss: str = "kl"
    mask_fraction: float = 0.5
    answer: int = 0
    hidden: int = 256
    intermediate: int = 1024
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 16000
    seq: int = 1024
    layers: int = 2
    aux: int = 3
    block: int = 8
    anchors: int = 96
    rank: int = 64

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def judged(self) -> int:
        """Judged slots of a block."""
        return self.block if self.next_token else self.block - 1

    @property
    def mask_token(self) -> int:
        return self.vocab - 1

    def supervised(self) -> Tensor:
        """Return 1 for every token of an answer, [S] fp32.

        Raises:
            ValueError: a block of one answer could reach into the next.
        """
        answer = self.answer or self.seq - int(self.seq * self.mask_fraction)
        turn = self.seq if self.answer == 0 else round(answer / (1 - self.mask_fraction))
        if self.answer and turn - answer < self.block:
            raise ValueError(f"prompts of {turn - answer} tokens are shorter than a block")
        return (torch.arange(self.seq) % turn >= turn - answer).float()

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """Weights of the losses, as in LOSSES."""
        return LOSSES[self.loss]

    def weights(self) -> dict[str, Tensor]:
        """fp32, named as in DFlash's and DSpark's Hugging Face files."""
        generator = torch.Generator().manual_seed(0)
        size, kv, ffn = self.hidden, self.kv_heads * self.head_dim, self.intermediate
        shapes = {"fc.weight": (size, self.aux * size)}
        ones = {"hidden_norm": size, "norm": size}
        for i in range(self.layers):
            p = f"layers.{i}."
            shapes |= {f"{p}self_attn.{x}_proj.weight": (rows, size)
                       for x, rows in (("q", size), ("k", kv), ("v", kv), ("o", size))}  # fmt: skip
            shapes |= {f"{p}mlp.{x}_proj.weight": (ffn, size) for x in ("gate", "up")}
            shapes[f"{p}mlp.down_proj.weight"] = (size, ffn)
            ones |= {f"{p}input_layernorm": size, f"{p}post_attention_layernorm": size}
            ones |= {f"{p}self_attn.{x}_norm": self.head_dim for x in "qk"}
        if self.next_token:
            shapes["markov_head.markov_w1.weight"] = (self.vocab, self.rank)
            shapes["markov_head.markov_w2.weight"] = (self.vocab, self.rank)
        weights = {
            name: torch.randn(shape, generator=generator) * shape[1] ** -0.5
            for name, shape in shapes.items()
        }
        return weights | {f"{name}.weight": torch.ones(width) for name, width in ones.items()}

    def inputs(self) -> BlockInputs:
        """Make the base's outputs, fp32, and the anchors.

        Raises:
            ValueError: fewer than ``anchors`` blocks have a slot to judge.
        """
        generator = torch.Generator().manual_seed(1)
        size = self.hidden

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        supervised = self.supervised()
        both = supervised[:-1] * supervised[1:]
        candidates = both[: self.seq - self.block].nonzero().flatten()
        candidates = candidates[candidates > 0]  # the first token has no context
        if len(candidates) < self.anchors:
            raise ValueError(f"{len(candidates)} rows can begin a block, and {self.anchors} should")
        chosen = torch.randperm(len(candidates), generator=generator)[: self.anchors]
        return BlockInputs(
            tokens=torch.randint(self.mask_token, (self.seq,), generator=generator),
            supervised=supervised,
            anchors=candidates[chosen].sort().values,
            aux=normal(self.seq, self.aux * size),
            # Of RMS 1, as a norm leaves it: the peer applies one.
            final_hidden=torch.nn.functional.rms_norm(normal(self.seq, size), (size,)),
            embedding=normal(self.vocab, size),
            output_weight=normal(self.vocab, size) * 2 * size**-0.5,
        )

    def judged_slots(self, inputs: BlockInputs) -> Tensor:
        """Return which slots of each block are judged, [N, K] fp32: up to the answer's end."""
        said = inputs.anchors.unsqueeze(1) + 1 + torch.arange(self.judged)
        return inputs.supervised[said].cumprod(1)

    def in_our_words(self, divergence: float) -> float:
        """Return our loss where a mean over rows of the weighted divergence is ``divergence``: ours
        is a cross-entropy, and divided by the weights' sum."""
        inputs = self.inputs()
        judged = self.judged_slots(inputs)
        weights = judged * torch.exp(-torch.arange(self.judged) / DECAY)
        entropy = 0.0
        for slot, weight in enumerate(weights.unbind(1)):
            logits = inputs.final_hidden[inputs.anchors + slot] @ inputs.output_weight.t()
            each = torch.distributions.Categorical(logits=logits).entropy()
            entropy += float((each * weight).sum())
        return (divergence * float(judged.sum()) + entropy) / float(weights.sum())


@dataclass(frozen=True)
class BlockInputs:
    """tokens, supervised [S] (entry i: is x_i); anchors [N], ascending; aux [S, A * H] and
    final_hidden [S, H] of the base, its embedding and output_weight [V, H]."""

    tokens: Tensor
    supervised: Tensor
    anchors: Tensor
    aux: Tensor
    final_hidden: Tensor
    embedding: Tensor
    output_weight: Tensor


def add_block_flags(parser: argparse.ArgumentParser) -> None:
    """Declare a flag per size, and what is trained."""
    for field in dataclasses.fields(BlockProblem):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "next_token":
            parser.add_argument("--dspark", dest="next_token", action="store_true")
        elif field.name == "loss":
            parser.add_argument(flag, choices=LOSSES, default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)


def block_problem_from(args: argparse.Namespace) -> BlockProblem:
    """Return the problem of parsed flags."""
    names = [field.name for field in dataclasses.fields(BlockProblem)]
    return BlockProblem(**{name: getattr(args, name) for name in names})
