"""The directory layouts a draft is exported in, and the drafts that each server can run.

Servers do not fail on what they do not know: a flag that a reader ignores, or a tensor under a name
it skips, gives wrong drafts in silence. So each reason not to write a format is a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eagle.hf.draft.info import DraftInfo


@dataclass(frozen=True)
class Format:
    """``servers`` get their command on the model card. Layers are named ``single_layer`` when there
    is one, else ``layers.{i}.``; ``later_norms`` are the names given to the norm in front of the
    attention of layers >= 1."""

    name: str
    servers: tuple[str, ...]
    single_layer: str = "midlayer."
    later_norms: tuple[str, ...] = ("input_layernorm", "hidden_norm")

    def layer_prefix(self, index: int, num_layers: int, eagle1: bool) -> str:
        """What the tensors of layer ``index`` begin with."""
        return self.single_layer if num_layers == 1 and not eagle1 else f"layers.{index}."


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
    """Raise ``ValueError`` with the reason when a reader of ``layout`` cannot run this draft."""
    if reason := _refusal(layout, info):
        others = [item.name for item in FORMATS.values() if not _refusal(item, info)]
        hint = f"; use --format {' or '.join(others)}" if others else ""
        raise ValueError(f"--format {layout.name}: {reason}{hint}")


def _refusal(layout: Format, info: DraftInfo) -> str | None:
    """Why a reader of ``layout`` would draft wrongly, or None."""
    if info.options.algorithm == "eagle1" and layout.name in ("hf", "speculators"):
        return (
            "vLLM refuses the fc.bias that SGLang needs of an EAGLE-1 draft"
            if layout.name == "hf"
            else "the speculators library has no EAGLE-1 of this form"
        )
    if info.options.attention == "mla" and (reason := _mla_refusal(layout, info)):
        return reason
    if info.options.algorithm == "p-eagle" and layout.name == "speculators":
        return "P-EAGLE in the speculators library's form is not known here"
    for server in layout.servers:
        if reason := _server_refusal(server, info):
            return f"{SERVER_NAMES[server]} {reason}"
    return None


def _mla_refusal(layout: Format, info: DraftInfo) -> str | None:
    """What readers of drafts with multi-latent attention do not know."""
    if info.options.algorithm in ("eagle1", "p-eagle"):
        return f"no server reads a {info.options.algorithm} draft of --eagle-attention mla"
    if layout.name == "speculators":
        return "the speculators library has no draft of --eagle-attention mla"
    if not info.layer_args["q_lora_rank"]:
        return "no server reads a draft of --eagle-attention mla without --eagle-q-lora-rank"
    for server in layout.servers:
        if info.options.norm_before_fc and server != "trtllm":
            return f"{SERVER_NAMES[server]} does not know --eagle-norm-before-fc in an MLA draft"
        if info.num_layers > 1 and server == "sglang":
            return "SGLang runs MLA drafts of one layer alone"
    return None


def _server_refusal(server: str, info: DraftInfo) -> str | None:
    if info.options.algorithm == "eagle1":
        return "does not load EAGLE-1 drafts" if server == "trtllm" else None
    if info.options.algorithm == "p-eagle" and server != "vllm":
        return "does not draft in parallel with an EAGLE-3 draft"
    if server == "vllm":
        return None
    if info.options.norm_before_residual:
        return "does not know --eagle-norm-before-residual"
    if len(info.aux_layers) == 1:
        return "skips fc when a single layer is captured"
    return None
