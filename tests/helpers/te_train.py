"""Train with Transformer Engine's modules and its Adam on a CPU, by the installed command.

    python -m tests.helpers.te_train FLAGS ...

A process of its own: Megatron looks for Transformer Engine when it is imported. The trainer is told
that there is a CUDA device where it chooses layers, and while modules are built.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any
from unittest import mock

from tests.helpers.te_python import install_te


def main(words: list[str]) -> int:
    install_te()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_eagle.cli import train
    from megatron_eagle.compat import require
    from megatron_eagle.platform import enable

    enable()
    from megatron_eagle.training import builder, implied_flags

    adam = require("megatron.core.optimizer:Adam")
    assert adam.__module__.startswith("transformer_engine."), adam
    with (
        mock.patch.object(implied_flags, "is_enabled", lambda: False),
        mock.patch.object(builder, "build_base", _as_on_a_gpu(builder.build_base)),
        mock.patch.object(builder, "build_draft", _as_on_a_gpu(builder.build_draft)),
    ):
        return train.main([*words, *implied_flags.CPU_FLAGS, "--no-rope-fusion"])


def _as_on_a_gpu(build: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.cuda.is_available", lambda: True):
            return build(*args, **kwargs)

    return wrapped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
