"""Directory of offline features: its files, and reading them.

``plan.json`` describes the extraction: the base, its aux layers, the number of documents per shard.
A shard has three data files (``captured``: rows of aux hidden states, ``final``: rows of final
hidden states, ``documents``: tokens and masks) and a JSON with their sizes and checksums, written
last. ``index.json`` is written when all shards are there; training reads no directory without it.

A document whose last supervised token is u_max keeps the aux hidden states of tokens 0 .. u_max - 1
(prompts included, since the draft attends to them) and the final hidden states of its supervised
tokens.

Shapes: N documents, n tokens of one, r tokens with aux hidden states, m supervised tokens, A aux
layers, H hidden size and V ids of the base.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.features.codec import STORED_DTYPES, RowCodec
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object, reading, reading_file

FORMAT, VERSION = "megatron_eagle.features", 1
ROW_FILES = ("captured", "final")
_LISTS: dict[str, type] = {"aux_layers": int, "layer_sizes": float, "shards": int}
"""Fields of a plan that are lists, and the type of their items."""


@dataclass(frozen=True)
class FeaturePlan:
    """Description of an extraction, as ``plan.json`` and ``index.json`` hold it.

    ``fingerprint`` identifies the base's weights; ``documents`` is a digest of all ids and masks;
    ``stored`` and ``computed`` are the dtypes of files and base; ``layer_sizes`` is the typical RMS
    of each aux layer, with which a new draft is scaled; ``shards`` counts each shard's documents.
    """

    base: str
    fingerprint: str
    source: str
    documents: str
    seq_length: int
    aux_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    stored: str
    computed: str
    layer_sizes: tuple[float, ...]
    shards: tuple[int, ...]

    def codec(self, kind: str) -> RowCodec:
        """Return the encoding of the row file ``kind``."""
        blocks = len(self.aux_layers) if kind == "captured" else 1
        return RowCodec(self.stored, blocks, self.hidden_size)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object, format and version included."""
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}


def shard_file(directory: Path, shard: int, kind: str) -> Path:
    """Return the path of a shard's file; ``kind`` is one of ROW_FILES, "documents" or "json"."""
    suffix = {"documents": "documents.npz", "json": "json"}.get(kind, f"{kind}.bin")
    return directory / f"shard_{shard:05d}.{suffix}"


def needed_positions(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """Return what training reads of a document with this mask [n].

    (r: aux hidden states of the first r tokens; positions [m] of the final hidden states)
    """
    targets = np.flatnonzero(mask[1:]) + 1
    return (int(targets[-1]) if len(targets) else 0), targets


def read_plan(directory: Path, name: str = "index.json") -> FeaturePlan:
    """Read a plan; raise ``UserError`` naming it if it is absent, unfinished or damaged."""
    file = directory / name
    with reading("offline_features", directory):
        if not file.is_file():
            begun = (directory / "plan.json").is_file()
            why = "unfinished; run the extraction again" if begun else "no index.json in it"
            raise UserError(f"<offline_features> {literal(directory)}: {why}")
        content = read_json_object(file)
        if (content.pop("format", None), content.pop("version", None)) != (FORMAT, VERSION):
            raise UserError(f"{literal(file)}: cannot be read: another format or version")
        return _checked_plan(content, literal(file))


def _checked_plan(content: dict[str, Any], source: str) -> FeaturePlan:
    """Return the plan with the fields ``content``; raise ``UserError``, starting with ``source``,
    for a field that is missing, unknown or of another type."""
    expected = get_type_hints(FeaturePlan)
    for name in expected.keys() ^ content.keys():
        what = "unknown field" if name in content else "missing field"
        raise UserError(f"{source}: cannot be read: {what} {literal(repr(name))}")
    for name, kind in expected.items():
        value = content[name]
        if name in _LISTS:
            fits = isinstance(value, list) and all(type(item) is _LISTS[name] for item in value)
        else:
            fits = type(value) is kind and (kind is not int or value > 0)
        if not fits:
            raise UserError(f"{source}: cannot be read: {name} holds {literal(repr(value)[:60])}")
    if content["stored"] not in STORED_DTYPES:
        raise UserError(f"{source}: cannot be read: stored is {literal(content['stored'])}")
    if any(count < 1 for count in content["shards"]):
        raise UserError(f"{source}: cannot be read: a shard without documents")
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    return FeaturePlan(**fields)


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(directory: Path) -> None:
    """Recompute every checksum; raise ``UserError`` naming the first file that differs."""
    for shard in range(len(read_plan(directory).shards)):
        for name, digest in _shard_description(directory, shard)["sha256"].items():
            if checksum(directory / name) != digest:
                raise UserError(f"{directory / name}: damaged, its checksum differs")


class FeatureDocuments:
    """Documents with the hidden states of their tokens, memory-mapped; ``lengths`` [N] int64.

    Raises ``UserError`` naming directory or file when a file is missing or truncated, or the
    features were made with another base than the one of ``fingerprint``.
    """

    def __init__(self, directory: str, fingerprint: str, vocab_size: int) -> None:
        self.directory = Path(directory)
        self.plan = read_plan(self.directory)
        where = f"<offline_features> {directory}"
        if self.plan.fingerprint != fingerprint:
            raise UserError(f"{where}: features of another base, {self.plan.base}")
        if self.plan.vocab_size != vocab_size:
            raise UserError(
                f"{where}: made with a base of {self.plan.vocab_size} token ids, not {vocab_size}"
            )
        self._shards = [
            _Shard(self.directory, number, documents, self.plan)
            for number, documents in enumerate(self.plan.shards)
        ]
        self._firsts = np.cumsum([0, *self.plan.shards])[:-1].tolist()
        self.lengths: np.ndarray = np.concatenate([shard.lengths for shard in self._shards])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] int64 and mask [n] bool (True: supervised) of one document."""
        shard, document = self._find(index)
        return shard.tokens(document)

    def hidden(self, index: int) -> tuple[Tensor, Tensor]:
        """Return aux_hidden [r, A * H] of the document's first r tokens and final_hidden [m, H] of
        its m supervised tokens, in fp32 or bf16."""
        shard, document = self._find(index)
        return shard.hidden(document)

    def counts(self, vocab_size: int) -> Tensor:
        """Count how often each id is supervised, [V] int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for shard in self._shards:
            counts += np.bincount(shard.ids[shard.mask > 0], minlength=vocab_size)
        return torch.from_numpy(counts)

    def _find(self, index: int) -> tuple[_Shard, int]:
        number = bisect_right(self._firsts, index) - 1
        return self._shards[number], index - self._firsts[number]


class _Shard:
    def __init__(self, directory: Path, number: int, documents: int, plan: FeaturePlan) -> None:
        sizes = _shard_description(directory, number)["bytes"]
        for name, size in sizes.items():
            file = directory / name
            actual = file.stat().st_size if file.is_file() else None
            if actual != size:
                fault = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise UserError(f"{file} {fault}")
        file = shard_file(directory, number, "documents")
        with reading_file(file), np.load(file, allow_pickle=False) as content:
            self.ids, self.mask = content["ids"], content["mask"]
            self.lengths: np.ndarray = content["lengths"]
            self._check(documents, literal(file))
        self._starts = _starts(self.lengths)
        rows = [needed_positions(self.tokens(i)[1]) for i in range(documents)]
        self._rows = {
            "captured": _starts([count for count, _ in rows]),
            "final": _starts([len(targets) for _, targets in rows]),
        }
        self._codecs = {kind: plan.codec(kind) for kind in ROW_FILES}
        self._maps = {
            kind: np.memmap(shard_file(directory, number, kind), np.uint8, "r").reshape(
                -1, self._codecs[kind].row_bytes
            )
            for kind in ROW_FILES
        }

    def _check(self, documents: int, source: str) -> None:
        """Raise ``UserError``, starting with ``source``, unless the arrays fit together."""
        fits = (
            self.lengths.shape == (documents,)
            and int(self.lengths.min()) > 0
            and self.ids.shape == self.mask.shape == (int(self.lengths.sum()),)
        )
        if not fits:
            raise UserError(f"{source}: holds other documents than its plan")

    def tokens(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._starts[document], self._starts[document + 1])
        return self.ids[part].astype(np.int64), self.mask[part] > 0

    def hidden(self, document: int) -> tuple[Tensor, Tensor]:
        aux_hidden, final_hidden = (
            self._codecs[kind].decode(
                self._maps[kind][self._rows[kind][document] : self._rows[kind][document + 1]]
            )
            for kind in ROW_FILES
        )
        return aux_hidden, final_hidden


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _shard_description(directory: Path, number: int) -> dict[str, Any]:
    file = shard_file(directory, number, "json")
    content = read_json_object(file)
    names = {shard_file(directory, number, kind).name for kind in (*ROW_FILES, "documents")}
    for key in ("bytes", "sha256"):
        if not isinstance(content.get(key), dict) or set(content[key]) != names:
            raise UserError(f"{literal(file)}: cannot be read: {key} must name {sorted(names)}")
    return content
