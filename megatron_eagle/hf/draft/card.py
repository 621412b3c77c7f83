"""The model card (README.md) of an exported draft: origin, figures, how to serve it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.hf.draft.commands import converter_paragraphs, server_paragraph
from megatron_eagle.hf.draft.figures import figure_rows
from megatron_eagle.hf.draft.formats import Format, format_notes, servers_of
from megatron_eagle.hf.draft.info import DraftInfo

SAMPLING = (
    "The accepted length is that of greedy answers. A server samples as the base's "
    'generation_config.json says, unless a request says otherwise (`"temperature": 0`)'
)


@dataclass(frozen=True)
class CardFacts:
    """Hold what a model card says beyond the draft's description.

    Attributes:
        checkpoint: name of the directory that was converted.
        data: description of the training data.
        base_note: which files of the base go with the draft, where its name does not say it.
        evaluation: figures of ``megatron-eagle eval`` or of an evaluation while training.
    """

    checkpoint: str
    data: str | None = None
    base_note: str | None = None
    evaluation: dict[str, Any] | None = None


def model_card(info: DraftInfo, facts: CardFacts, *, fmt: Format, dtype: torch.dtype) -> str:
    """Return README.md of a draft written in ``fmt`` with weights of ``dtype``."""
    paragraphs = [server_paragraph(server, info) for server in servers_of(fmt, info)[0]]
    commands = "\n".join(paragraphs + converter_paragraphs(fmt, info))
    notes = "\n".join(f"* {note}." for note in [*format_notes(fmt, info), SAMPLING])
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(info, facts, dtype))
    return f"""---
tags:
- {info.spec.algorithm}
- speculative-decoding
---
# {algorithm_name(info)} draft for {_base_name(info)}

| | |
|---|---|
{rows}

The draft has no embedding of its own: servers share the base's. The tokenizer is the base's.

## Serving

`BASE` is the base model, `DRAFT` this directory.

{commands}
{notes}

The conversion wrote and checked these files; it ran no server on them.
"""


def _rows(info: DraftInfo, facts: CardFacts, dtype: torch.dtype) -> list[tuple[str, str]]:
    vocabulary = (
        f"{info.draft_vocab_size:,} of the base's {info.base.vocab_size:,} token ids (`d2t`)"
        if info.compressed
        else f"the base's {info.base.vocab_size:,} token ids"
    )
    rows = [
        ("base", f"{_base_name(info)} ({info.base.source or info.base.family})"),
        *([("serve beside", facts.base_note)] if facts.base_note else []),
        ("captured layers (outputs, 0-based)", ", ".join(map(str, info.aux_layers)) or "none"),
        ("draft layers", f"{info.num_layers}, {_attention(info)}"),
        ("trained for", _trained_for(info)),
        ("training data", _data(info, facts)),
        ("draft vocabulary", vocabulary),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("converted from", f"`{facts.checkpoint}`"),
    ]
    return rows + figure_rows(facts.evaluation)


def algorithm_name(info: DraftInfo) -> str:
    """Return the algorithm as people write it: EAGLE-1, EAGLE-3, EAGLE-3.1, P-EAGLE."""
    return info.spec.method.title


def _base_name(info: DraftInfo) -> str:
    """Return the base's name for a reader elsewhere: of a path its last part."""
    path = Path(info.base.name)
    return path.name if path.is_absolute() else info.base.name


def _attention(info: DraftInfo) -> str:
    return "multi-latent attention" if info.spec.uses_mla else "grouped queries"


def _trained_for(info: DraftInfo) -> str:
    if info.spec.method.drafts_blocks:
        return f"blocks of {info.spec.slots} slots, {info.ttt_steps} drafts"
    return f"{info.ttt_steps} draft steps"


def _data(info: DraftInfo, facts: CardFacts) -> str:
    train_data = info.training.get("train_data")
    recorded = Path(train_data).name if isinstance(train_data, str) else ""
    return facts.data or recorded or "not recorded"
