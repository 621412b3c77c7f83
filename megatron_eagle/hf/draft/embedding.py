"""The copy of the base's embedding in a draft's files: never imported, only compared.

SpecForge leaves the embedding out of the files, SafeAILab writes the frozen copy; training here and
the servers use the base's own. A copy that differs was trained, or belongs to another base.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.files import DraftFiles

NAME = "embed_tokens.weight"
BASE_NAME = "embedding.word_embeddings.weight"
RTOL, ATOL = 2**-7, 1e-6
"""The difference that storing a copy in another 16-bit dtype may make."""


def check_embedding(files: DraftFiles, base_directory: str | Path) -> None:
    """Compare the draft's embedding, if its files hold one, with that of its base.

    Reads the rows of the first block of the checkpoint ``base_directory``, 64 MiB at most. Raises
    ``UserError``, naming the draft's directory, where the two differ by more than rounding.
    """
    for name in files.shapes:
        if name.endswith(NAME):
            expected = CheckpointReader.open(base_directory).first_rows(BASE_NAME).float()
            copy = files.tensor(name, expected.shape[0]).float()
            if copy.shape != expected.shape or not torch.allclose(copy, expected, RTOL, ATOL):
                raise UserError(
                    f"{files.path}: {name} is not the embedding of {base_directory}, which "
                    "training would use: the draft is another base's or trained its own "
                    "(<adapt> accepts that)"
                )
