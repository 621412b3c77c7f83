"""Train and evaluate in one process, or parse as on a GPU, in an environment of other packages.

    python -m tests.helpers.environment_case train SAVE EVAL_PROMPTS FLAGS ...
    python -m tests.helpers.environment_case parse FLAGS ...       (prints JSON)
    python -m tests.helpers.environment_case parse-te FLAGS ...    (with Transformer Engine)

A process of its own, because Megatron looks for Apex and Transformer Engine when it is imported.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from unittest import mock

from tests.helpers.te_python import install_te


def main(mode: str, *words: str) -> int:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if mode == "train":
        return train_and_evaluate(*words)
    if mode == "parse-te":
        install_te()
    print(json.dumps(parse_as_on_a_gpu(list(words))))
    return 0


def train_and_evaluate(save: str, prompts: str, *words: str) -> int:
    """Train by the installed command, then decode with what it saved."""
    from megatron_eagle.cli import evaluate, train

    assert "apex" in sys.modules or __import__("apex")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = train.main([*words, "--save", save, "--save-interval", "1000"])
    from megatron.core import parallel_state

    base = words[words.index("--eagle-base-checkpoint") + 1]
    flags = ["--base", base, "--draft", save, "--prompts", prompts, "--max-new-tokens", "4"]
    for more in ([], ["--bf16"]):
        parallel_state.destroy_model_parallel()
        os.environ.pop("MASTER_ADDR", None)
        status = status or evaluate.main([*flags, *more])
    return status


def parse_as_on_a_gpu(words: list[str]) -> dict[str, object]:
    """Parse the training flags as a process with a CUDA device does, up to Megatron's
    TransformerConfig; what was chosen, or the error."""
    from megatron_eagle.cli.boundary import shown
    from megatron_eagle.cli.train import flag_of
    from megatron_eagle.config.flags import parse_eagle_flags
    from megatron_eagle.platform import enable

    enable()
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_eagle.training import arguments, implied_flags

    try:
        with mock.patch.object(implied_flags, "is_enabled", lambda: False):
            args, _ = arguments.parse_eagle_args(parse_eagle_flags(words), words)
        pretrain_cfg_container_from_args(args)
        config = core_transformer_config_from_args(args)
    except ValueError as error:
        return {"error": shown(error, flag_of)}
    return {
        "layers": args.transformer_impl,
        "rope_fusion": config.apply_rope_fusion,
        "gradient_fusion": config.gradient_accumulation_fusion,
        "persist_layer_norm": config.persist_layer_norm,
        "eval_iters": args.eval_iters,
    }


def parse_rank(rank: int, world: int, words: list[str]) -> dict[str, object]:
    """``parse_as_on_a_gpu`` on a rank of the test harness, where neither package is installed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    return parse_as_on_a_gpu(words)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
