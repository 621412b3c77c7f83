"""The directory layouts a draft is exported in, and the drafts that each server can run.

Servers do not fail on what they do not know: a flag that a reader ignores, or a tensor under a name
it skips, gives wrong drafts in silence. So each reason not to write a format is a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eagle.hf.draft_info import DraftInfo


@dataclass(frozen=True)
class Format:
    """``servers`` get their command on the model card. Layers are named ``single_layer`` when there
    is one, else ``layers.{i}.``; ``later_norms`` are the names given to the norm in front of the
    attention of layers >= 1."""

    name: str
    servers: tuple[str, ...]
    single_layer: str = "midlayer."
    later_norms: tuple[str, ...] = ("input_layernorm", "hidden_norm")

    def layer_prefix(self, index: int, num_layers: int) -> str:
        """What the tensors of layer ``index`` begin with."""
        return self.single_layer if num_layers == 1 else f"layers.{index}."


FORMATS = {
    item.name: item
    for item in (
        Format("hf", ("vllm", "sglang", "trtllm")),
        Format("vllm", ("vllm",), later_norms=("input_layernorm",)),
        Format("sglang", ("sglang",), later_norms=("hidden_norm",)),
        Format("trtllm", ("trtllm",), later_norms=("hidden_norm",)),
        Format(
            "speculators",
            ("vllm",),
            single_layer="layers.0.",
            later_norms=("input_layernorm",),
        ),
    )
}
SERVER_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}


def check_servers(layout: Format, info: DraftInfo) -> None:
    """Raise ``ValueError`` with the reason when a server of ``layout`` cannot run this draft."""
    for server in layout.servers:
        if reason := _refusal(server, info):
            others = [
                item.name
                for item in FORMATS.values()
                if not any(_refusal(name, info) for name in item.servers)
            ]
            hint = f"; use --format {' or '.join(others)}" if others else ""
            raise ValueError(f"--format {layout.name}: {SERVER_NAMES[server]} {reason}{hint}")


def _refusal(server: str, info: DraftInfo) -> str | None:
    """Why ``server`` would draft wrongly, or None."""
    if len(info.aux_layers) == 1 and server in ("sglang", "trtllm"):
        return "skips fc when a single layer is captured"
    return None
