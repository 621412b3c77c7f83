"""What a draft's checkpoint says about itself: JSON inside a fixed-size uint8 tensor.

Kept as a tensor of the checkpoint rather than as a file beside it, so that it is saved, resharded
and loaded with the weights by any Megatron checkpoint strategy, and read without unpickling.

Format version 2 holds the architecture (``spec``, strictly checked), the base and a record of the
training options that nobody parses. Version 1 held all options in one flat ``config``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import DraftSpec, EagleConfig
from megatron_eagle.config.widths import LAYER_WIDTHS, layer_widths
from megatron_eagle.errors import UserError
from megatron_eagle.user_files import parse_json

FORMAT = "megatron_eagle.draft"
VERSION = 2
SIZE = 16384

_VERSION_1_TRAINING = frozenset(
    (
        "base_checkpoint",
        "compile",
        "detach_steps",
        "eval_draft_tokens",
        "eval_interval",
        "eval_new_tokens",
        "eval_prompts",
        "init_from_base",
        "lk_decay",
        "log_file",
        "logits_budget_mib",
        "loss",
        "loss_chunk_mib",
        "mask_out_of_vocab",
        "moe_aux_loss_coeff",
        "nvtx",
        "offline_features",
        "pack",
        "regression_weight",
        "step_decay",
        "teacher_memory",
        "train_data",
        "ttt_steps",
        "vocab_map",
        "warm_start",
    )
)
"""Options of version 1's ``config`` that do not belong to the architecture."""


def resolved_spec(
    spec: DraftSpec, base: BaseInfo, aux_layers: Sequence[int], vocab_size: int
) -> DraftSpec:
    """Return ``spec`` with the aux layers and the vocabulary's size that the run has chosen."""
    return replace(
        spec,
        aux_layers=tuple(aux_layers) or None,
        draft_vocab_size=vocab_size if vocab_size < base.vocab_size else None,
    )


def draft_metadata(
    spec: DraftSpec,
    base: BaseInfo,
    *,
    ttt_steps: int,
    training: dict[str, Any] | None = None,
    expert_parallel: int = 1,
) -> dict[str, Any]:
    """Return what the checkpoint of this draft says: its resolved ``spec``, its base, the TTT steps
    and other options it was trained with; for a MoE draft how many ranks its experts are cut over.
    """
    experts = {} if spec.num_experts is None else {"expert_parallel": expert_parallel}
    return {
        **experts,
        "spec": spec.to_mapping(),
        "ttt_steps": ttt_steps,
        "base": base.as_dict(),
        "training": training or {},
    }


def run_metadata(
    config: EagleConfig, base: BaseInfo, spec: DraftSpec, expert_parallel: int
) -> dict[str, Any]:
    """Return the metadata of the draft that a training run saves; ``spec`` is resolved."""
    return draft_metadata(
        spec,
        base,
        ttt_steps=config.steps,
        training=config.train.to_mapping(),
        expert_parallel=expert_parallel,
    )


def encode_metadata(content: dict[str, Any]) -> Tensor:
    """Encode ``content`` as uint8 [SIZE]: UTF-8 JSON padded with spaces."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}).encode()
    if len(text) > SIZE:
        raise UserError(f"the draft's metadata take {len(text)} bytes, at most {SIZE} fit")
    return torch.frombuffer(bytearray(text.ljust(SIZE)), dtype=torch.uint8)


def decode_metadata(tensor: Tensor, source: str) -> dict[str, Any]:
    """Decode metadata of either version into the content of version 2.

    Raises :class:`UserError` naming ``source`` if it is not a draft's metadata, or of a version 1
    with an option that this release does not know, since it might change what the weights mean.
    """
    content = parse_json(
        bytes(tensor.cpu().numpy().tobytes()), f"{source}: the draft's metadata are damaged"
    )
    if not isinstance(content, dict):
        raise UserError(f"{source}: the draft's metadata are damaged: not a JSON object")
    if content.get("format") != FORMAT or content.get("version") not in (1, VERSION):
        raise UserError(
            f"{source}: not a draft of this program's format: "
            f"{content.get('format')!r} version {content.get('version')!r}"
        )
    return _from_version_1(content, source) if content["version"] == 1 else content


def _from_version_1(content: dict[str, Any], source: str) -> dict[str, Any]:
    config = content.pop("config", None)
    if not isinstance(config, dict):
        raise UserError(f"{source}: config is missing")
    architecture = {field.name for field in fields(DraftSpec)}
    if unknown := sorted(set(config) - architecture - _VERSION_1_TRAINING):
        raise UserError(f"{source}: unknown draft options in the checkpoint: {unknown}")
    spec = {name: value for name, value in config.items() if name in architecture}
    spec["aux_layers"] = content.pop("aux_layers", None) or None
    spec["draft_vocab_size"] = content.pop("draft_vocab_size", None)
    if spec["draft_vocab_size"] is None:
        raise UserError(f"{source}: draft_vocab_size is missing")
    base = content.get("base")
    if isinstance(base, dict) and spec["draft_vocab_size"] == base.get("vocab_size"):
        spec["draft_vocab_size"] = None
    training = {name: value for name, value in config.items() if name in _VERSION_1_TRAINING}
    return {**content, "version": VERSION, "spec": spec, "training": training}


def check_same_experts(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` if the optimizer of ``source`` cannot be resumed: Megatron loads
    that of a MoE draft only with its experts cut as they were."""
    before, after = (content.get("expert_parallel", 1) for content in (saved, now))
    if before != after:
        raise UserError(
            f"<expert_model_parallel_size> {after}: the MoE draft in {source} was trained with "
            f"{before}; resume with that, or give <no_load_optim> for its weights alone"
        )


def check_same_draft(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` naming the option if the draft of ``source`` is not this run's.

    The number of TTT steps and other training options may change on resume.
    """
    # Another base of the same dimensions would go on training a draft for nobody.
    if any(saved["base"][key] != now["base"][key] for key in ("megatron_args", "fingerprint")):
        raise UserError(
            f"<base_checkpoint>: the draft in {source} was trained on another base, "
            f"{saved['base']['name']}"
        )
    before, after = (_comparable(content) for content in (saved, now))
    for name in before:
        if before[name] != after.get(name):
            raise UserError(
                f"<{name}>: this run has {_words(after.get(name))}, "
                f"the draft in {source} {_words(before[name])}"
            )


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    """Return every field of the architecture, widths with the base's defaults filled in."""
    spec = DraftSpec.from_mapping(content["spec"])
    elsewhere = {*LAYER_WIDTHS, "draft_vocab_size"}  # ids are compared with the vocabulary
    others = {k: v for k, v in spec.to_mapping().items() if k not in elsewhere}
    return {**others, **layer_widths(spec, content["base"]["megatron_args"])}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
