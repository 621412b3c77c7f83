"""A record of the training data beside the checkpoints, so that other data are noticed on resume.

A resumed run goes on at the sample where the last one stopped. In other data that is another place,
and documents are seen twice or never, without a trace in the metrics.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eagle.checkpoint.atomic import write_json
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.errors import UserError
from megatron_eagle.user_files import read_json_object

logger = logging.getLogger("megatron_eagle")
FILE_NAME = "training_data.json"
SAMPLED_DOCUMENTS = 256
SAMPLED_BLOCKS, BLOCK_BYTES = 256, 4096


def document_record(fitted: FittedDocuments) -> dict[str, Any]:
    """Describe documents by their number and a digest of all lengths and of some contents."""
    digest = hashlib.sha256(np.ascontiguousarray(fitted.lengths, dtype=np.int64).tobytes())
    step = max(1, len(fitted) // SAMPLED_DOCUMENTS)
    for index in range(0, len(fitted), step):
        ids, mask = fitted[index]
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + np.packbits(mask).tobytes())
    return {"documents": len(fitted), "sha256": digest.hexdigest()}


def indexed_record(prefixes: list[str]) -> dict[str, Any]:
    """Describe the data sets of ``--data-path``, in order, by the sizes of their files and a digest
    of blocks spread over them."""
    files = [Path(f"{prefix}.bin") for prefix in prefixes]
    sizes, digest = [file.stat().st_size for file in files], hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb") as content:
            for start in range(0, size, max(BLOCK_BYTES, size // SAMPLED_BLOCKS)):
                content.seek(start)
                digest.update(content.read(BLOCK_BYTES))
    return {"data_sets": len(prefixes), "bytes": sizes, "sha256": digest.hexdigest()}


def note_training_data(args: Any, record: dict[str, Any]) -> None:
    """Warn if a run resumes with other data than the record in ``--load``; write it to ``--save``.

    The first rank does it, the others do nothing.
    """
    if torch.distributed.get_rank() != 0:
        return
    if args.load is not None and args.iteration > 0 and not args.finetune:
        before = _read(Path(args.load) / FILE_NAME)
        # A record of an earlier release may say less.
        if before is not None and any(record.get(name) != before[name] for name in before):
            logger.warning(
                "--load %s: was trained on other data (%s then, %s now): this run goes on at "
                "sample %d of these",
                args.load,
                before.get("documents", before.get("bytes")),
                record.get("documents", record.get("bytes")),
                args.consumed_train_samples,
            )
    if args.save is not None:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.save) / FILE_NAME, record)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(file) if file.is_file() else None
    except UserError:
        return None
