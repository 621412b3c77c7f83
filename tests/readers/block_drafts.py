"""Exported block drafts, and what the oracle says of two blocks of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.block_config import block_config
from megatron_eagle.hf.draft.checkpoint import read_info
from megatron_eagle.hf.draft.formats import FORMATS
from tests.helpers.block_case import BlockCase, reference_of
from tests.helpers.block_files import VARIANTS, checkpoint_of, export, make_draft, make_files_base
from tests.reference.blocks import ReferenceBlocks

BLOCK_DRAFTS = tuple(VARIANTS)
LENGTH, ANCHORS = 20, (6, 11)


@dataclass(frozen=True)
class BlockSample:
    """tokens [LENGTH]; features [LENGTH, A * H]; logits and confidence: of the block at each of
    ANCHORS, [B, D] and [B], teacher-forced with ``tokens``."""

    directory: Path
    case: BlockCase
    reference: ReferenceBlocks
    tokens: Tensor
    features: Tensor
    logits: list[Tensor]
    confidence: list[Tensor | None]


@torch.no_grad()
def block_sample(folder: Path, name: str, fmt: str) -> BlockSample | str:
    """The draft ``name`` exported as ``fmt``, or why it is refused."""
    base = make_files_base(folder)
    case = make_draft(base, name)
    checkpoint = checkpoint_of(case, base, folder)
    try:
        directory = export(checkpoint, folder / "exported", fmt)
    except UserError as error:
        if fmt != "speculators":
            return str(error)
        # The library runs what the servers of its format do not.
        directory = export(checkpoint, folder / "exported", "sglang")
        info = read_info(CheckpointReader.open(checkpoint))
        config = block_config(info, FORMATS[fmt], torch.float32)
        (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tokens = torch.randint(case.config.vocab_size, (LENGTH,))
    features = torch.randn(LENGTH, case.config.num_aux * case.config.hidden_size)
    reference, slots = reference_of(case), case.config.block_size
    logits, confidence = [], []
    for anchor in ANCHORS:
        outputs = reference.block(features.double(), anchor, tokens[anchor])
        previous = tokens[anchor : anchor + slots]
        logits.append(reference.logits(outputs, previous).float())
        confidence.append(None)
        if case.config.confidence:
            e = reference.markov_head.markov_w1(previous)
            read = reference.confidence_head["proj"](torch.cat([outputs, e], -1))
            confidence[-1] = read.squeeze(-1).float()
    return BlockSample(directory, case, reference, tokens, features, logits, confidence)
