"""Checkpoint directories on disk: which iteration to read, and the base's own description.

A Megatron checkpoint directory holds `latest_checkpointed_iteration.txt` ("release" or a number)
and `release/` or `iter_0000100/`; a base written by tools/import_base.py also `eagle_base.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TRACKER_NAME = "latest_checkpointed_iteration.txt"
BASE_JSON_NAME = "eagle_base.json"
ACCEPTED_LENGTH_NAME = "accepted_length.json"
"""In an iteration's directory: what training measured of the draft, see docs/guide/evaluate.md."""
BASE_FORMAT = "megatron_eagle.base"
BASE_VERSION = 1


@dataclass(frozen=True)
class BaseInfo:
    """What eagle_base.json says of a base.

    `fingerprint` tells the weights from those of another base of the same dimensions;
    `vocab_size` is unpadded; `hf_config` is the Hugging Face config.json, without the
    `quantization_config` of weights that were unpacked; `megatron_args` maps argparse names to
    values: every architecture flag that training needs. `rope` is what no flag can say of the
    rotary embedding, see :mod:`megatron_eagle.attention.rope`.
    """

    family: str
    name: str
    fingerprint: str
    vocab_size: int
    hf_config: dict[str, Any]
    megatron_args: dict[str, Any]
    rope: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of eagle_base.json, format and version included."""
        return {"format": BASE_FORMAT, "version": BASE_VERSION, **asdict(self)}


def token_ids(hf_config: dict[str, Any], key: str) -> list[int]:
    """The ids of a config.json field such as `eos_token_id`: a number, a list, null or missing."""
    value = hf_config.get(key)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def resolve_checkpoint(directory: str | Path) -> Path:
    """The `torch_dist` directory that `directory`'s tracker file names, checked to be complete.

    Raises ValueError when the directory, its tracker or the checkpoint it names is not there.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root}: no such checkpoint directory")
    tracker = root / TRACKER_NAME
    if not tracker.is_file():
        raise ValueError(f"{root}: not a Megatron checkpoint, {TRACKER_NAME} is missing")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise ValueError(f"{tracker}: expected 'release' or an iteration, found {text[:40]!r}")
    path = root / (text if text == "release" else f"iter_{int(text):07d}")
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise ValueError(f"{path}: incomplete torch_dist checkpoint, {name} is missing")
    return path


def load_base_json(directory: str | Path) -> BaseInfo:
    """BaseInfo of the base checkpoint `directory` (the one that holds eagle_base.json).

    Raises ValueError when it is missing, malformed, or of another format or version.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root}: no such base checkpoint directory")
    path = root / BASE_JSON_NAME
    if not path.is_file():
        raise ValueError(f"{root}: {BASE_JSON_NAME} is missing; write it with tools/import_base.py")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return parse_base(value, str(path))


def parse_base(value: Any, source: str) -> BaseInfo:
    """BaseInfo from the decoded JSON `value`; ValueErrors start with `source`."""
    if not isinstance(value, dict) or value.get("format") != BASE_FORMAT:
        raise ValueError(f"{source}: not a {BASE_FORMAT} description")
    if value.get("version") != BASE_VERSION:
        raise ValueError(
            f"{source}: version {value.get('version')!r}, but this release reads {BASE_VERSION}"
        )
    kinds = {
        "family": str,
        "name": str,
        "fingerprint": str,
        "vocab_size": int,
        "hf_config": dict,
        "megatron_args": dict,
        "rope": dict,
    }
    value = {"rope": {}, **value}
    for key, kind in kinds.items():
        if type(value.get(key)) is not kind:
            raise ValueError(f"{source}: {key} must be of type {kind.__name__}")
    return BaseInfo(**{key: value[key] for key in kinds})
