"""Load tokenizers and models with transformers, never their own code, never from the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading

_SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_MARKS = ("trust_remote_code", "custom code")
"""Words of transformers' refusal to run the Python files of a directory."""


def load_hf_tokenizer(directory: str | Path, parameter: str) -> Any:
    """Return the transformers tokenizer in ``directory``.

    Raises ``UserError`` naming ``parameter``, whatever is wrong with its files. Python files in it
    are never run.
    """
    from transformers import AutoTokenizer

    with _without_code(parameter, directory):
        return AutoTokenizer.from_pretrained(directory, **_SAFELY)


def load_hf_model(directory: str | Path, parameter: str, dtype: Any) -> Any:
    """Return the transformers causal model in ``directory``, in evaluation mode.

    Raises ``UserError`` naming ``parameter``, whatever is wrong with its files. Python files in it
    are never run, pickles never read.
    """
    from transformers import AutoModelForCausalLM

    with _without_code(parameter, directory):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, **_SAFELY
        )
        return model.eval()


@contextmanager
def _without_code(parameter: str, directory: str | Path) -> Iterator[None]:
    """Read inside ``reading``; what needs code of its own is told how to do without."""
    with reading(parameter, directory):
        try:
            yield
        except Exception as error:
            if any(mark in str(error) for mark in _MARKS):
                raise UserError(
                    f"<{parameter}> {literal(directory)}: needs the Python code beside it, which "
                    "is never run; make token ids (prompt_ids and answer_ids) with a program that "
                    "you trust to run it"
                ) from error
            raise
