"""P-EAGLE (arXiv 2602.01469): all steps in one pass, the later ones from a learned mask hidden."""

from __future__ import annotations

from typing import ClassVar

from megatron_eagle.algorithms.base import Schedule
from megatron_eagle.algorithms.eagle3 import Eagle3

_ONE_PASS = "does not draft in parallel with an EAGLE-3 draft"


class PEagle(Eagle3):
    """EAGLE-3 whose later steps read a mask token and a mask hidden state instead of outputs."""

    name = "p-eagle"
    title = "P-EAGLE"
    options = Eagle3.options - {"norm_before_fc", "detach_steps"} | {"mask_token"}
    required = frozenset({"mask_token"})
    reasons: ClassVar = {
        "norm_before_fc": "has no norm in front of fc",
        "detach_steps": "feeds nothing from step to step",
        "regression_weight": Eagle3.reasons["regression_weight"],
    }

    learns_mask_hidden = True

    parallel_drafting = True
    refusals: ClassVar = {
        "speculators": "P-EAGLE in the speculators library's form is not known here",
        "sglang": f"SGLang {_ONE_PASS}",
        "trtllm": f"TensorRT-LLM {_ONE_PASS}",
    }
    served_with_mla = False

    def run[Result](self, schedule: Schedule[Result]) -> Result:
        return schedule.at_once()
