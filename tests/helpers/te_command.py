"""Run the installed commands with Transformer Engine's modules on a CPU.

    python -m tests.helpers.te_command train FLAGS ...
    python -m tests.helpers.te_command eval FLAGS ...
    python -m tests.helpers.te_command extract-features FLAGS ...

A process of its own: Megatron looks for Transformer Engine when it is imported. The commands are
told that there is a CUDA device where they choose layers, and while modules are built. Training has
Transformer Engine's Adam, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Any
from unittest import mock

from tests.helpers.te_python import install_te


def main(command: str, *words: str) -> int:
    install_te()
    from megatron_eagle.platform import enable

    enable()
    return train(list(words)) if command == "train" else run_tool(command, list(words))


def train(words: list[str]) -> int:
    from megatron_eagle.cli import train
    from megatron_eagle.compat import require
    from megatron_eagle.training import builder, implied_flags

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    adam = require("megatron.core.optimizer:Adam")
    assert adam.__module__.startswith("transformer_engine."), adam
    with mock.patch.object(implied_flags, "is_enabled", lambda: False), built_as_on_a_gpu(builder):
        return train.main([*words, *implied_flags.CPU_FLAGS, "--no-rope-fusion"])


def run_tool(command: str, words: list[str]) -> int:
    from megatron_eagle.cli import evaluate, extract_features
    from megatron_eagle.decode import load

    tool = {"eval": evaluate, "extract-features": extract_features}[command]
    with mock.patch.object(tool, "check_device"), built_as_on_a_gpu(load):
        return tool.main([*words, "--transformer-impl", "transformer_engine"])


@contextlib.contextmanager
def built_as_on_a_gpu(module: Any) -> Any:
    """Let what ``module`` calls to build base and draft find a device."""

    def wrapped(build: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with mock.patch("torch.cuda.is_available", lambda: True):
                return build(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in ("build_base", "build_draft"):
            patch = mock.patch.object(module, name, wrapped(getattr(module, name)))
            stack.enter_context(patch)
        yield


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
