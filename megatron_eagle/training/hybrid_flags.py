"""How a run cuts a HybridModel into pipeline stages: by the ``|`` in its pattern, or evenly."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import CUT, for_stages, is_recurrent, pattern_of
from megatron_eagle.config import EagleConfig
from megatron_eagle.errors import UserError, literal

FLAG = "--hybrid-layer-pattern"


def run_pattern(argv: Sequence[str], base: BaseInfo, stages: int) -> str | None:
    """Return the pattern of a run of ``stages`` pipeline stages: the user's in ``argv``, or the
    base's, with its cuts if these make as many stages; None for a GPTModel.

    Raises ``UserError`` for a pattern that is not the base's, and for one that is cut otherwise.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument(FLAG)
    chosen = parser.parse_known_args(argv)[0].hybrid_layer_pattern
    pattern = pattern_of(base.megatron_args)
    if chosen is None or pattern is None:
        if chosen is not None:
            raise UserError(f"{FLAG} {literal(chosen)}: the base is a GPTModel, which has none")
        return None if pattern is None else for_stages(pattern, stages)
    if chosen.replace(CUT, "") != pattern.replace(CUT, ""):
        raise UserError(f"{FLAG} {literal(chosen)} contradicts the base checkpoint: {pattern}")
    if CUT in chosen and (for_stages(chosen, stages) != chosen or "" in chosen.split(CUT)):
        raise UserError(
            f"{FLAG} {literal(chosen)}: cuts other than --pipeline-model-parallel-size {stages}"
        )
    return chosen


def check_recurrent(layout: argparse.Namespace, base: BaseInfo, options: EagleConfig) -> None:
    """Raise ``UserError`` for what layers without attention cannot do: keep packed documents apart,
    and decode where sequences are cut."""
    if not is_recurrent(base.megatron_args):
        return
    why = "the base has recurrent layers (G or M in its hybrid_layer_pattern)"
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if base.megatron_args.get(name, 0) % (tensor * context):
            raise UserError(
                f"--context-parallel-size {context} times --tensor-model-parallel-size {tensor} "
                f"does not divide the base's {name} = {base.megatron_args[name]}"
            )
    if options.train.pack:
        raise UserError(f"--eagle-pack: {why}, in which packed documents would run together")
    cut = layout.sequence_parallel or context > 1
    if options.train.eval_prompts is not None and cut:
        flag = "--sequence-parallel" if layout.sequence_parallel else "--context-parallel-size"
        raise UserError(f"--eagle-eval-prompts beside {flag}: {why}, which decode whole sequences")
