"""Malformed variants of a file: JSON with one value changed, bytes flipped, cut or put in."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DIGITS = "9" * 5000
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**12, 10**30, 1.5, float("nan"), float("inf"), "", "x",
    "--save", "../../x", "\ud800", [], {}, [None], ["x"], [[]], {"a": 1}, "a" * 10_000,
)  # fmt: skip
NAMES = ("save", "auto_map", "__class__", "", "a" * 500, "exit_interval", "rope_scaling")
BYTES = (b"", b"\x00", b"[" * 100_000, b"\xff\xfe", b"{}", b"null", b"[]", b"\n", b'"')


def malformed_json(text: str, rng: random.Random) -> bytes:
    """Return ``text`` with one value, name or byte changed."""
    if rng.random() < 0.2:
        return malformed_bytes(text.encode(), rng)
    value = copy.deepcopy(json.loads(text))
    place, key = _place(value, rng)
    action = rng.randrange(4)
    if place is None:
        value = rng.choice(STRANGE)
    elif action == 0 and isinstance(place, dict):
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place[rng.choice(NAMES)] = rng.choice(STRANGE)
    else:
        place[key] = rng.choice(STRANGE)
    changed = json.dumps(value)
    if rng.random() < 0.1:  # an integer that json.loads cannot convert
        changed = changed.replace(" 1", f" {DIGITS}", 1).replace(" 2", f" {DIGITS}", 1)
    return changed.encode()


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """Return a container inside ``value`` and a key of it; None for the value itself."""
    place, key = None, None
    while isinstance(value, dict | list) and value:
        place = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = value[key]
        if rng.random() < 0.3:
            break
    return place, key


def malformed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` flipped in one bit, cut, or with bytes put in or in its place."""
    at = rng.randrange(len(content) + 1)
    action = rng.randrange(5)
    if action == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if action == 1:
        return content[:at]
    if action == 2:
        return content[:at] + rng.choice(BYTES) + content[at:]
    if action == 3:
        return content[:at] + rng.randbytes(8) + content[at + 8 :]
    return rng.choice(BYTES)
