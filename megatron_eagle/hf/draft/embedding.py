"""A draft's copy of its base's embedding: not imported, but it tells whose draft it is.

SpecForge leaves it out of what it saves, SafeAILab writes the frozen copy; training here, and the
servers, use the base's own. A copy that differs was trained, or belongs to another base.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_eagle.checkpoint.reader import DraftCheckpoint
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.files import DraftFiles

NAME = "embed_tokens.weight"
BASE_NAME = "embedding.word_embeddings.weight"
RTOL, ATOL = 2**-7, 1e-6
"""What a copy in another 16-bit dtype may differ by."""


def check_embedding(files: DraftFiles, base_directory: str | Path) -> None:
    """Compare the draft's embedding, if its files hold one, with that of the base in checkpoint
    ``base_directory``: the rows of the checkpoint's first block, 64 MiB at most.

    Raises ValueError, naming the draft's directory, where they differ by more than rounding.
    """
    for name in files.shapes:
        if name.endswith(NAME):
            expected = DraftCheckpoint.open(base_directory).first_rows(BASE_NAME).float()
            found = files.tensor(name, expected.shape[0]).float()
            if found.shape != expected.shape or not torch.allclose(found, expected, RTOL, ATOL):
                raise UserError(
                    f"{files.path}: {name} is not the embedding of {base_directory}, which "
                    "training would use: the draft is another base's or trained its own "
                    "(<adapt> accepts that)"
                )
