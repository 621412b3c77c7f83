"""What a draft's checkpoint says about itself: JSON inside a fixed-size uint8 tensor.

Kept as a tensor of the checkpoint rather than as a file beside it, so that it is saved, resharded
and loaded with the weights by any Megatron checkpoint strategy, and read without unpickling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError

FORMAT = "megatron_eagle.draft"
VERSION = 1
SIZE = 16384


def draft_metadata(
    options: EagleConfig,
    base: BaseInfo,
    aux_layers: Sequence[int],
    vocab_size: int,
    expert_parallel: int = 1,
) -> dict[str, Any]:
    """What a checkpoint of this draft says: its options, its captured layers and its base; over how
    many ranks the experts of a MoE draft were cut."""
    cut = {} if options.num_experts is None else {"expert_parallel": expert_parallel}
    return {
        **cut,
        "config": options.to_mapping(),
        "aux_layers": list(aux_layers),
        "ttt_steps": options.ttt_steps,
        "draft_vocab_size": vocab_size,
        "base": base.as_dict(),
    }


def encode_metadata(content: dict[str, Any]) -> Tensor:
    """``content`` as uint8 [SIZE]: UTF-8 JSON padded with spaces."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}).encode()
    if len(text) > SIZE:
        raise UserError(f"the draft's metadata take {len(text)} bytes, at most {SIZE} fit")
    return torch.frombuffer(bytearray(text.ljust(SIZE)), dtype=torch.uint8)


def decode_metadata(tensor: Tensor, source: str) -> dict[str, Any]:
    """The inverse; raises ``ValueError`` naming ``source`` if it is not a draft's metadata."""
    try:
        content = json.loads(bytes(tensor.cpu().numpy()).decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: the draft's metadata are damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: the draft's metadata are damaged: not a JSON object")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(
            f"{source}: not a draft of this program's format: "
            f"{content.get('format')!r} version {content.get('version')!r}"
        )
    return content


def check_same_experts(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raise ``ValueError`` if the optimizer of ``source`` cannot be resumed: Megatron loads that of
    a MoE draft only with its experts cut as they were."""
    then, is_now = (content.get("expert_parallel", 1) for content in (saved, now))
    if then != is_now:
        raise UserError(
            f"<expert_model_parallel_size> {is_now}: the MoE draft in {source} was trained with "
            f"{then}; resume with that, or give <no_load_optim> for its weights alone"
        )


_SAME = (
    *(
        "algorithm",
        "num_layers",
        "attention",
        "norm_before_fc",
        "norm_before_residual",
        "mask_token",
    ),
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size"),
)
"""Options that decide what the weights mean, beside the widths and what has a key of its own."""


def check_same_draft(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raise ``ValueError`` naming the flag if the draft of ``source`` is not the one of this run.

    The number of TTT steps and other training options may change on resume.
    """
    for option in _SAME:
        then, is_now = (
            getattr(EagleConfig.from_mapping(content["config"]), option) for content in (saved, now)
        )
        if then != is_now:
            raise UserError(f"<{option}>: this run has {is_now}, the draft in {source} {then}")
    if saved["aux_layers"] != now["aux_layers"]:
        raise UserError(
            f"<aux_layers>: this run has {now['aux_layers']}, "
            f"the draft in {source} {saved['aux_layers']}"
        )
    # Another base of the same dimensions would go on training a draft for nobody.
    if any(saved["base"][key] != now["base"][key] for key in ("megatron_args", "fingerprint")):
        raise UserError(
            f"<base_checkpoint>: the draft in {source} was trained on another base, "
            f"{saved['base']['name']}"
        )
    widths = [
        EagleConfig.from_mapping(content["config"]).layer_widths(content["base"]["megatron_args"])
        for content in (saved, now)
    ]
    for name, then in widths[0].items():
        if then != widths[1][name]:
            raise UserError(
                f"<{name}>: this run has {widths[1][name]}, the draft in {source} {then}"
            )
