"""The model card (README.md) of an exported draft: origin, figures, the servers' commands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.checkpoint.directory import ACCEPTED_LENGTH_NAME
from megatron_eagle.errors import UserError, message_of
from megatron_eagle.hf.draft.formats import SERVER_NAMES, Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.files.safetensors_dir import read_json


@dataclass(frozen=True)
class CardFacts:
    """Hold what a model card says beyond the draft's description.

    Attributes:
        checkpoint: name of the directory that was converted.
        data: description of the training data.
        evaluation: figures of ``megatron-eagle eval`` or of an evaluation while training.
    """

    checkpoint: str
    data: str | None = None
    evaluation: dict[str, Any] | None = None


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the figures that ``megatron-eagle eval`` wrote to ``path``.

    Raises ``UserError`` naming ``<eval>`` for a file without these figures, for figures of an
    untrained draft, and for figures of answers other than the greedy ones.
    """
    try:
        figures = read_json(path)
    except ValueError as error:
        raise UserError(f"<eval> {message_of(error)}") from None
    if missing := _missing_figure(figures):
        raise UserError(f"<eval> {path}: {missing} is missing; did megatron-eagle eval write it?")
    if figures.get("reinitialize"):
        raise UserError(f"<eval> {path}: measured with <reinitialize>, not with trained weights")
    if figures.get("equal_to_greedy") is not True:
        raise UserError(f"<eval> {path}: its answers were not the greedy ones")
    return figures


def measured_in_training(iteration: Path) -> dict[str, Any] | None:
    """Read the figures that an evaluation while training left in directory ``iteration``.

    Returns None if there was no evaluation. Raises ``UserError`` naming a damaged file.
    """
    path = iteration / ACCEPTED_LENGTH_NAME
    if not path.is_file():
        return None
    figures = read_json(path)
    if missing := _missing_figure(figures):
        raise UserError(f"{path}: {missing} is missing")
    return figures


def _missing_figure(figures: dict[str, Any]) -> str | None:
    """Return the first figure that is missing or of the wrong type, or None."""
    types = {"accepted_length": float, "prompts": int, "draft_tokens": int, "acceptance": list}
    return next((key for key, cls in types.items() if type(figures.get(key)) is not cls), None)


def model_card(info: DraftInfo, facts: CardFacts, *, fmt: Format, dtype: torch.dtype) -> str:
    """Return README.md of a draft written in ``fmt`` with weights of ``dtype``."""
    commands = "\n".join(_command(server, info) for server in fmt.readers(info))
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(info, facts, dtype))
    return f"""---
tags:
- {info.spec.algorithm}
- speculative-decoding
---
# {algorithm_name(info)} draft for {info.base.name}

| | |
|---|---|
{rows}

The draft has no embedding of its own: servers share the base's. The tokenizer is the base's.

## Serving

`BASE` is the base model, `DRAFT` this directory.

{commands}
The conversion wrote and checked these files; it ran no server on them.
"""


def _rows(info: DraftInfo, facts: CardFacts, dtype: torch.dtype) -> list[tuple[str, str]]:
    vocabulary = (
        f"{info.draft_vocab_size:,} of the base's {info.base.vocab_size:,} token ids (`d2t`)"
        if info.compressed
        else f"the base's {info.base.vocab_size:,} token ids"
    )
    rows = [
        ("base", f"{info.base.name} ({info.base.family})"),
        ("captured layers (outputs, 0-based)", ", ".join(map(str, info.aux_layers)) or "none"),
        ("draft layers", f"{info.num_layers}, {_attention(info)}"),
        ("trained for", _trained_for(info)),
        ("training data", _data(info, facts)),
        ("draft vocabulary", vocabulary),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("converted from", f"`{facts.checkpoint}`"),
    ]
    return rows + _figures(facts.evaluation)


def algorithm_name(info: DraftInfo) -> str:
    """Return the algorithm as people write it: EAGLE-1, EAGLE-3, EAGLE-3.1, P-EAGLE."""
    return info.spec.method.title


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


def _figures(evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    if evaluation is None:
        return [("accepted length", "not measured (megatron-eagle eval)")]
    drafts, prompts = evaluation["draft_tokens"], evaluation["prompts"]
    shares = ", ".join(f"{share:.3f}" for share in evaluation["acceptance"])
    in_training = ", while training" if "iteration" in evaluation else ""
    return [
        (
            "accepted length",
            f"{evaluation['accepted_length']:.3f} tokens per verification, greedy, chains of "
            f"{drafts} drafts, {prompts} prompts{in_training}",
        ),
        ("accepted drafts per position", shares),
    ]


def _command(server: str, info: DraftInfo) -> str:
    """Return the paragraph of the card that starts ``server`` with this draft."""
    steps = info.ttt_steps
    method = info.spec.method.server_method
    parallel = ', "parallel_drafting": true' if info.spec.method.parallel_drafting else ""
    if info.spec.method.drafts_blocks and server == "sglang":
        # SGLang counts the verified tokens: the newest one and the drafts.
        return f"""{SERVER_NAMES[server]}:

    python -m sglang.launch_server --model-path BASE \\
      --speculative-algorithm {method.upper()} --speculative-draft-model-path DRAFT \\
      --speculative-num-draft-tokens {steps + 1}
"""
    command = {
        "vllm": f"""    vllm serve BASE --speculative-config \\
      '{{"method": "{method}", "model": "DRAFT", "num_speculative_tokens": {steps}{parallel}}}'
""",
        "sglang": f"""    python -m sglang.launch_server --model-path BASE \\
      --speculative-algorithm {method.upper()} --speculative-draft-model-path DRAFT \\
      --speculative-num-steps {steps} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {steps + 1}
""",
        "trtllm": f"""    cat > draft.yaml <<END
    speculative_config:
      decoding_type: Eagle3
      max_draft_len: {steps}
      speculative_model: DRAFT
      eagle3_layers_to_capture: {json.dumps(list(info.aux_layers))}
    END
    trtllm-serve BASE --extra_llm_api_options draft.yaml
""",
    }[server]
    return f"{SERVER_NAMES[server]}:\n\n{command}"
