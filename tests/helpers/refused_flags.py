"""Refusal of training flags, as a rank of the training command words it."""

from __future__ import annotations

import os


def refusal(rank: int, world: int, words: list[str]) -> str:
    """Return the error that the training flags ``words`` raise, or "accepted"."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    from megatron_eagle.cli.boundary import shown
    from megatron_eagle.cli.train import flag_of
    from megatron_eagle.config.flags import parse_eagle_flags
    from megatron_eagle.platform import enable
    from megatron_eagle.training.arguments import parse_eagle_args
    from megatron_eagle.training.warm_start import adopt_warm_start

    enable()
    try:
        options = adopt_warm_start(parse_eagle_flags(words), words)[0]
        args, base = parse_eagle_args(options, words)
        if options.train.eval_prompts is not None:
            from megatron_eagle.training.evaluation import AcceptanceEvaluation

            AcceptanceEvaluation(args, options, base, None)
    except ValueError as error:
        return shown(error, flag_of)
    return "accepted"
