"""Verification of an exported draft: its logits must equal those of the checkpoint's draft.

The checkpoint's draft runs in Megatron's modules, the exported files in ``PlainDraft``
(``hf/draft/plain_draft.py``), on the same random inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.rope import attention_factor, set_attention_factor
from megatron_eagle.decode.load import DraftCheckpointInfo, frozen_draft, restore
from megatron_eagle.decode.verify_block import largest_block_difference
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.layer_config import own_rotary
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.module_files import check_module
from megatron_eagle.hf.draft.plain_draft import PlainDraft
from megatron_eagle.objective.inputs import DraftInputs, query_angles
from megatron_eagle.objective.unroll import step_outputs
from megatron_eagle.teacher.build import base_config

ROWS, STEPS = 24, 4
TOLERANCE = 2e-4
"""Largest difference allowed, relative to the largest logit; both sides compute in fp32."""


def checkpoint_draft(
    about: DraftCheckpointInfo, directory: str | Path, pg_collection: Any
) -> EagleDraft:
    """Load the draft of ``directory`` on this process alone, in fp32, without its base's weights.

    An EAGLE-1 draft, whose head is the base's, gets an empty head.
    """
    base = about.info.base
    config = base_config(base, 1)
    if not config.multi_latent_attention:
        set_attention_factor(config, attention_factor(base.rope))
    multiple = base.megatron_args["make_vocab_size_divisible_by"]
    rows = -(-base.vocab_size // multiple) * multiple
    draft = frozen_draft(
        about,
        config,
        pg_collection,
        base_head=lambda: torch.empty(rows, 0),
        base_head_rows=rows,
        rotary=own_rotary(base, about.info.spec, torch.device("cpu")),
        initialize=False,
    )
    return restore(draft, directory)


@torch.no_grad()
def largest_difference(draft: EagleDraft, exported: Path, dtype: torch.dtype) -> float:
    """Return the largest difference of logits (EAGLE-1: of hidden states), relative to the largest.

    Both drafts run ``STEPS`` TTT steps on random inputs. ``draft``'s weights are first rounded to
    ``dtype``, the export's, in place.
    """
    for parameter in draft.parameters():
        parameter.copy_(parameter.to(dtype))
    if isinstance(draft, BlockDraft):
        return largest_block_difference(draft, exported)
    generator = torch.Generator().manual_seed(0)
    width = draft.config.hidden_size
    algorithm = draft.algorithm
    inputs = width if algorithm.reads_final_hidden else draft.num_aux * width
    features = torch.randn(ROWS, inputs, generator=generator)
    embeddings = torch.randn(ROWS + STEPS - 1, width, generator=generator)
    mask = torch.randn(width, generator=generator) if algorithm.learns_mask_hidden else None
    expected = PlainDraft(exported).run(features, embeddings, steps=STEPS, mask_embedding=mask)
    outputs = _run(draft, features, embeddings, mask)
    differences = [
        (a - b).abs().max() / b.abs().max() for a, b in zip(outputs, expected, strict=True)
    ]
    return float(torch.stack(differences).max())


def _run(
    draft: EagleDraft, features: Tensor, embeddings: Tensor, mask: Tensor | None
) -> list[Tensor]:
    device = draft.vocab_ids.device
    rotary = draft.rotary(ROWS + STEPS - 1).to(device)
    inputs = DraftInputs(
        features=features.unsqueeze(1).to(device),
        live=LiveRows.everything(ROWS, 1).to(lambda index: index.to(device)),
        embeddings=embeddings.to(device),
        entries=[torch.arange(step, step + ROWS, device=device) for step in range(STEPS)],
        angles=[query_angles(rotary, [(0, ROWS)], step) for step in range(STEPS)],
        mask_embedding=None if mask is None else mask.to(device),
    )
    outputs = [output[:, 0] for output in step_outputs(draft, inputs)]
    if not draft.algorithm.shares_base_head:
        outputs = [output @ draft.lm_head().t() for output in outputs]
    return [output.float().cpu() for output in outputs]


def compared(about: DraftCheckpointInfo) -> str:
    """Name what :func:`check_export` compares."""
    method = about.info.spec.method
    if method.is_base_module:
        return "all tensors"
    return "a block's outputs" if method.drafts_blocks else f"{STEPS} steps"


def check_export(
    about: DraftCheckpointInfo, checkpoint: str | Path, exported: Path, pg_collection: Any
) -> float:
    """Return ``largest_difference``; raise ``ValueError`` if it is more than rounding. Of a
    next-token module the tensors themselves are compared."""
    if about.info.spec.method.is_base_module:
        check_module(checkpoint, exported)
        return 0.0
    draft = checkpoint_draft(about, checkpoint, pg_collection)
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    layers = config.get("transformer_layer_config", config)
    dtype = getattr(torch, layers.get("torch_dtype") or "float32")
    difference = largest_difference(draft, exported, dtype)
    if not difference <= TOLERANCE:
        raise UserError(
            f"<verify>: the exported files give other logits than {checkpoint}: "
            f"{difference:.1e} of the largest"
        )
    return difference
