"""What a draft's checkpoint says about itself: JSON inside a fixed-size uint8 tensor.

Kept as a tensor of the checkpoint rather than as a file beside it, so that it is saved, resharded
and loaded with the weights by any Megatron checkpoint strategy, and read without unpickling.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

FORMAT = "megatron_eagle.draft"
VERSION = 1
SIZE = 16384


def encode_metadata(content: dict[str, Any]) -> Tensor:
    """``content`` as uint8 [SIZE]: UTF-8 JSON padded with spaces."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}).encode()
    if len(text) > SIZE:
        raise ValueError(f"the draft's metadata take {len(text)} bytes, at most {SIZE} fit")
    return torch.frombuffer(bytearray(text.ljust(SIZE)), dtype=torch.uint8)


def decode_metadata(tensor: Tensor, source: str) -> dict[str, Any]:
    """The inverse; raises ``ValueError`` naming ``source`` if it is not a draft's metadata."""
    try:
        content = json.loads(bytes(tensor.cpu().numpy()).decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: the draft's metadata are damaged: {error}") from error
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(
            f"{source}: not a draft of this program's format: "
            f"{content.get('format')!r} version {content.get('version')!r}"
        )
    return content


def check_same_draft(saved: Tensor, current: Tensor) -> None:
    """Raise ``ValueError`` naming the flag if the draft saved (``--load``) is not the one built.

    The number of TTT steps and other training options may change on resume.
    """
    before, now = decode_metadata(saved, "--load"), decode_metadata(current, "this run")
    for flag, key in (("--eagle-aux-layers", "aux_layers"), ("--eagle-num-layers", "num_layers")):
        if before[key] != now[key]:
            raise ValueError(f"{flag}: this run has {now[key]}, the draft in --load {before[key]}")
    if before["base"]["megatron_args"] != now["base"]["megatron_args"]:
        raise ValueError(
            "--eagle-base-checkpoint: the draft in --load was trained on another base, "
            f"{before['base']['name']}"
        )
