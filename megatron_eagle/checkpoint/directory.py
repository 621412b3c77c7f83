"""Checkpoint directories on disk: the iteration to read, and the base's own description.

A Megatron checkpoint directory holds ``latest_checkpointed_iteration.txt`` ("release" or a number)
and ``release/`` or ``iter_0000100/``; an imported base also holds ``eagle_base.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.base_fields import (
    check_megatron_args,
    check_rope,
    check_token_ids,
)
from megatron_eagle.checkpoint.native.formats import refuse_other_formats
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json, reading, reading_file

TRACKER_NAME = "latest_checkpointed_iteration.txt"
BASE_JSON_NAME = "eagle_base.json"
ACCEPTED_LENGTH_NAME = "accepted_length.json"
"""File in an iteration's directory with what training measured of the draft."""
BASE_FORMAT = "megatron_eagle.base"
BASE_VERSION = 1
MOST_DIGITS = 12
"""Digits of an iteration in a tracker file: more are damage."""


@dataclass(frozen=True)
class BaseInfo:
    """Description of a base, as eagle_base.json holds it.

    ``fingerprint`` identifies the weights among bases of the same dimensions; ``vocab_size`` is
    unpadded; ``hf_config`` is the Hugging Face config.json, without the ``quantization_config`` of
    weights that were unpacked and with the end tokens of generation_config.json; ``megatron_args``
    maps the argparse names of all architecture flags that training needs to values; ``rope`` holds
    the properties of the rotary embedding that have no Megatron flag (see ``attention/rope.py``).
    Of a base that Megatron itself trained, ``family`` is ``megatron-gpt`` or ``megatron-hybrid``,
    ``hf_config`` holds the fields that its arguments know, ``source`` says who saved it and when,
    and ``tokenizer`` names the one it was trained with. ``num_layers`` of a HybridModel counts its
    layers as Hugging Face does (``checkpoint/hybrid_pattern.py``).
    """

    family: str
    name: str
    fingerprint: str
    vocab_size: int
    hf_config: dict[str, Any]
    megatron_args: dict[str, Any]
    rope: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    tokenizer: dict[str, Any] = field(default_factory=dict)

    @property
    def is_native(self) -> bool:
        """Return whether Megatron trained it: then all conventions are Megatron's own."""
        return self.family.startswith("megatron-")

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of eagle_base.json, format and version included."""
        return {"format": BASE_FORMAT, "version": BASE_VERSION, **asdict(self)}


def token_ids(hf_config: dict[str, Any], key: str) -> list[int]:
    """Return the ids in a config.json field such as ``eos_token_id``, as ``parse_base`` has
    checked them.

    The field may be a number, a list, null or missing.
    """
    value = hf_config.get(key)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def resolve_checkpoint(directory: str | Path) -> Path:
    """Return the ``torch_dist`` directory that the tracker file in ``directory`` names.

    Raises ``UserError`` when the directory, its tracker or the checkpoint it names is missing, or
    the checkpoint is incomplete.
    """
    root = Path(directory)
    with reading_file(root):
        if not root.is_dir():
            raise UserError(f"{literal(root)}: no such checkpoint directory")
        path = root / _tracked(root)
        refuse_other_formats(path)
        for name in ("metadata.json", ".metadata"):
            if not (path / name).is_file():
                raise UserError(
                    f"{literal(path)}: incomplete torch_dist checkpoint, {name} is missing"
                )
        return path


def iteration_directory(directory: str | Path, iteration: int) -> Path:
    """Return the place of an iteration in the checkpoint directory ``directory``."""
    return Path(directory) / f"iter_{iteration:07d}"


def _tracked(root: Path) -> str:
    """Return the name of the directory that the tracker file in ``root`` names."""
    tracker = root / TRACKER_NAME
    if not tracker.is_file():
        inside = sorted(path.name for path in root.glob("iter_*") if path.is_dir())
        way_out = f"; name one of its iterations, such as {literal(inside[-1])}" if inside else ""
        raise UserError(
            f"{literal(root)}: not a Megatron checkpoint, {TRACKER_NAME} is missing{way_out}"
        )
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return text
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise UserError(
            f"{literal(tracker)}: expected 'release' or an iteration, not "
            f"{literal(repr(text[:40]))}"
        )
    return f"iter_{int(text):07d}"


def checkpoint_directory(path: str | Path) -> Path:
    """Return the directory with ``.metadata``: ``path`` or the iteration in its tracker file.

    Raises ``UserError`` when it is missing, incomplete, or in another format than torch_dist.
    """
    directory = Path(path)
    if not (directory.name.startswith("iter_") or (directory / ".metadata").is_file()):
        return resolve_checkpoint(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory")
    if not (directory / ".metadata").is_file():
        refuse_other_formats(directory)
        raise UserError(f"{directory}: incomplete torch_dist checkpoint, .metadata is missing")
    return directory


def load_base_json(directory: str | Path) -> BaseInfo:
    """Read the description of the base checkpoint ``directory``, which holds eagle_base.json.

    Raises ``UserError`` when it is missing, malformed, or of another
    format or version, and for a field that is unknown or holds what it cannot.
    """
    root = Path(directory)
    with reading("base_checkpoint", root):
        if not root.is_dir():
            raise UserError(f"{literal(root)}: no such base checkpoint directory")
        path = root / BASE_JSON_NAME
        if not path.is_file():
            raise UserError(
                f"{literal(root)}: {BASE_JSON_NAME} is missing; importing a base writes it"
            )
        return parse_base(read_json(path), literal(path))


def parse_base(value: Any, source: str) -> BaseInfo:
    """Parse the decoded JSON ``value``; raise ``UserError``, starting with ``source``, if bad."""
    if not isinstance(value, dict) or value.get("format") != BASE_FORMAT:
        raise UserError(f"{source}: not a {BASE_FORMAT} description")
    if value.get("version") != BASE_VERSION:
        raise UserError(
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
        "source": str,
        "tokenizer": dict,
    }
    value = {"rope": {}, "source": "", "tokenizer": {}, **value}
    if unknown := sorted(set(value) - set(kinds) - {"format", "version"}):
        raise UserError(f"{source}: unknown field {literal(repr(unknown[0]))}")
    for key, kind in kinds.items():
        if type(value.get(key)) is not kind:
            raise UserError(f"{source}: {key} must be of type {kind.__name__}")
    base = BaseInfo(**{key: value[key] for key in kinds})
    check_megatron_args(base.megatron_args, source)
    check_rope(base.rope, source)
    size = base.megatron_args.get("vocab_size", base.vocab_size)
    if base.vocab_size != size:
        raise UserError(f"{source}: vocab_size {base.vocab_size}, but megatron_args have {size}")
    check_token_ids(base.hf_config, base.vocab_size, source)
    return base
