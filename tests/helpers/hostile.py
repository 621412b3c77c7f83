"""Pickles and directories that run code where they are let: they make a directory, the trap."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

CALLS = ("mkdir", "eval", "exec", "popen", "partial", "import", "getattr", "torch_hub", "setstate")
"""Ways to call something from a pickle."""


class Hostile:
    """An object whose unpickling makes the directory ``trap``."""

    def __init__(self, call: str, trap: Path) -> None:
        self.call, self.trap = call, str(trap)

    def __reduce__(self) -> Any:
        code = f"__import__('os').mkdir({self.trap!r})"
        return {
            "mkdir": (os.mkdir, (self.trap,)),
            "eval": (eval, (code,)),
            "exec": (exec, (code,)),
            "popen": (subprocess.Popen, (["mkdir", self.trap],)),
            "partial": (functools.partial(os.mkdir, self.trap), ()),
            "import": (importlib.import_module, ("this",)),
            "getattr": (getattr, (Path(self.trap), "mkdir")),
            "torch_hub": (torch.hub.load, (self.trap, "model")),
            "setstate": (setattr, (subprocess.Popen, "trap", self.trap)),
        }[self.call]


def model_with_code(directory: Path, trap: Path) -> Path:
    """A Hugging Face directory whose configuration, tokenizer and model ask for Python code."""
    directory.mkdir(parents=True, exist_ok=True)
    classes = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", "evil.T"],
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "zz", "auto_map": classes}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "evil.py").write_text(f"import os\nos.makedirs({str(trap)!r}, exist_ok=True)\n")
    return directory
