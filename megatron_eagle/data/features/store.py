"""The directory of offline features: what is in it, and reading it.

``plan.json`` says what was to be written: the base, its captured layers, how documents fall into
shards. A shard is three files, raw rows of captured layers, raw rows of final hidden states, and
the documents' tokens and masks, and a JSON with their sizes and checksums that is written last.
``index.json`` is written when all shards are there; training reads nothing without it.

Of a document whose last supervised token is u_max, the captured layers of tokens 0 .. u_max - 1 are
kept (prompts too: the draft attends to them) and the final hidden of supervised tokens only.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.features.codec import RowCodec

FORMAT, VERSION = "megatron_eagle.features", 1
ROW_FILES = ("captured", "final")


@dataclass(frozen=True)
class FeaturePlan:
    """``shards``: the number of documents of each. ``fingerprint``: of the base's weights.
    ``documents``: a digest of all ids and masks. ``layer_sizes``: the typical RMS of each captured
    layer, by which a draft is started.
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
        blocks = len(self.aux_layers) if kind == "captured" else 1
        return RowCodec(self.stored, blocks, self.hidden_size)

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}


def shard_file(directory: Path, shard: int, kind: str) -> Path:
    """``kind`` is one of ROW_FILES, "documents" or "json"."""
    suffix = {"documents": "documents.npz", "json": "json"}.get(kind, f"{kind}.bin")
    return directory / f"shard_{shard:05d}.{suffix}"


def needed_rows(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """(how many tokens of a document need captured layers, which ones need a final hidden)."""
    targets = np.flatnonzero(mask[1:]) + 1
    return (int(targets[-1]) if len(targets) else 0), targets


def read_plan(directory: Path, name: str = "index.json") -> FeaturePlan:
    """``ValueError`` naming the directory if it is not there, unfinished, or another format."""
    where = f"--eagle-offline-features {directory}"
    file = directory / name
    if not file.is_file():
        begun = (directory / "plan.json").is_file()
        why = "unfinished; run tools/extract_features.py again" if begun else "no index.json in it"
        raise ValueError(f"{where}: {why}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
        }
        return FeaturePlan(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {name} cannot be read: {error}") from None


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(directory: Path) -> None:
    """Recompute every checksum; ``ValueError`` naming the first file that differs."""
    for shard in range(len(read_plan(directory).shards)):
        for name, digest in _shard_description(directory, shard)["sha256"].items():
            if checksum(directory / name) != digest:
                raise ValueError(f"{directory / name}: damaged, its checksum differs")


class FeatureDocuments:
    """Documents with the hidden states of their tokens, memory-mapped.

    Raises ``ValueError`` naming directory or file when something is missing, cut short, or was made
    by another base than ``fingerprint``.
    """

    def __init__(self, directory: str, fingerprint: str, vocab_size: int) -> None:
        self.directory = Path(directory)
        self.plan = read_plan(self.directory)
        where = f"--eagle-offline-features {directory}"
        if self.plan.fingerprint != fingerprint:
            raise ValueError(f"{where}: features of another base, {self.plan.base}")
        if self.plan.vocab_size != vocab_size:
            raise ValueError(f"{where}: of a base with {self.plan.vocab_size} token ids")
        self._shards = [
            _Shard(self.directory, number, documents, self.plan)
            for number, documents in enumerate(self.plan.shards)
        ]
        self._firsts = np.cumsum([0, *self.plan.shards])[:-1].tolist()
        self.lengths: np.ndarray = np.concatenate([shard.lengths for shard in self._shards])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] int64 and mask [n] bool of one document."""
        shard, document = self._find(index)
        return shard.tokens(document)

    def hidden(self, index: int) -> tuple[Tensor, Tensor]:
        """Captured layers [r, A * H] of the document's first r tokens, and final hidden [m, H] of
        its m supervised tokens, in fp32 or bf16."""
        shard, document = self._find(index)
        return shard.hidden(document)

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id is supervised, [V] int64."""
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
            found = (directory / name).stat().st_size if (directory / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise ValueError(f"--eagle-offline-features {directory}: {name} {what}")
        with np.load(shard_file(directory, number, "documents"), allow_pickle=False) as content:
            self.ids, self.mask = content["ids"], content["mask"]
            self.lengths: np.ndarray = content["lengths"]
        assert len(self.lengths) == documents
        self._starts = _starts(self.lengths)
        rows = [needed_rows(self.tokens(i)[1]) for i in range(documents)]
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

    def tokens(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._starts[document], self._starts[document + 1])
        return self.ids[part].astype(np.int64), self.mask[part] > 0

    def hidden(self, document: int) -> tuple[Tensor, Tensor]:
        captured, final = (
            self._codecs[kind].decode(
                self._maps[kind][self._rows[kind][document] : self._rows[kind][document + 1]]
            )
            for kind in ROW_FILES
        )
        return captured, final


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _shard_description(directory: Path, number: int) -> dict[str, Any]:
    file = shard_file(directory, number, "json")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--eagle-offline-features {directory}: {file.name}: {error}") from None
