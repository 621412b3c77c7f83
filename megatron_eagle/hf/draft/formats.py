"""The formats that a draft is exported in, and the drafts that each server can run.

A server that ignores a flag, or skips a tensor because of its name, drafts wrongly without an
error. So every reason not to write a format is a line here or in an algorithm's ``refusals``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.info import DraftInfo


@dataclass(frozen=True)
class Format:
    """The names of tensors and files that one or more servers read.

    Attributes:
        servers: the readers of this format, whose commands the model card gives.
        single_layer: prefix of the layer's tensors in a draft of one layer; in a draft of more
            layers, and where ``fc`` joins (EAGLE-1), the prefix is ``layers.{i}.``.
        later_norms: names of the norm in front of the attention in layers >= 1. It is written under
            each of them, because readers differ.
    """

    name: str
    servers: tuple[str, ...]
    single_layer: str = "midlayer."
    later_norms: tuple[str, ...] = ("input_layernorm", "hidden_norm")

    def readers(self, info: DraftInfo) -> tuple[str, ...]:
        """Return the servers that are to read this draft: of a format that several read, those that
        know its algorithm at all."""
        if len(self.servers) == 1 or not info.spec.method.drafts_blocks:
            return self.servers
        return tuple(name for name in self.servers if name not in info.spec.method.refusals)

    def layer_prefix(self, index: int, info: DraftInfo) -> str:
        """Return the prefix of the tensors of layer ``index``."""
        method = info.spec.method
        single = info.num_layers == 1 and not (method.joins_by_fc or method.drafts_blocks)
        return self.single_layer if single else f"layers.{index}."


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
WITHOUT_BLOCKS = {
    "vllm": ("mixtral", "glm4_moe"),
    "sglang": ("qwen2", "qwen2_moe", "mixtral", "glm4_moe"),
}
"""Server -> types of bases (model_type) that it captures no hidden states of for block drafts."""
SERVER_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}


def check_servers(fmt: Format, info: DraftInfo) -> None:
    """Raise ``UserError`` with the reason if a reader of ``fmt`` cannot run this draft."""
    if reason := _refusal(fmt, info):
        usable = [item.name for item in FORMATS.values() if not _refusal(item, info)]
        hint = f"; use <format> {' or '.join(usable)}" if usable else ""
        raise UserError(f"<format> {fmt.name}: {reason}{hint}")


def _refusal(fmt: Format, info: DraftInfo) -> str | None:
    """Return the reason why a reader of ``fmt`` would draft wrongly, or None."""
    spec = info.spec
    if reason := spec.method.refusals.get(fmt.name):
        return reason
    if spec.uses_mla and (reason := _mla_refusal(fmt, info)):
        return reason
    for server in fmt.readers(info):
        if reason := spec.method.refusals.get(server):
            return reason
        if reason := _server_refusal(server, info):
            return f"{SERVER_NAMES[server]} {reason}"
    return None


def _mla_refusal(fmt: Format, info: DraftInfo) -> str | None:
    """Return the reason why a reader of ``fmt`` cannot run this MLA draft, or None."""
    if not info.spec.method.served_with_mla:
        return f"no server reads a {info.spec.algorithm} draft of <attention> mla"
    if fmt.name == "speculators":
        return "the speculators library has no draft of <attention> mla"
    if not info.layer_args["q_lora_rank"]:
        return "no server reads a draft of <attention> mla without <q_lora_rank>"
    for server in fmt.servers:
        if info.spec.norm_before_fc and server != "trtllm":
            return f"{SERVER_NAMES[server]} does not know <norm_before_fc> in an MLA draft"
        if info.num_layers > 1 and server == "sglang":
            return "SGLang runs MLA drafts of one layer alone"
    return None


def _block_refusal(server: str, info: DraftInfo) -> str | None:
    """Return the reason why ``server`` cannot run a block draft, or None."""
    spec, base = info.spec, info.base
    if base.family in WITHOUT_BLOCKS.get(server, ()):
        return f"does not run block drafts with a base of type {base.family}"
    if server == "vllm" and spec.markov is not None and spec.markov[0] != "vanilla":
        return f"knows no <markov_head> {spec.markov[0]}, only vanilla"
    if server == "sglang" and info.compressed:
        return "has no vocabulary map for block drafts: it would draft other tokens"
    last = base.megatron_args["num_layers"] - 1
    if server == "sglang" and last in info.aux_layers:
        return f"does not capture the base's last layer, {last} (<aux_layers>)"
    return None


def _server_refusal(server: str, info: DraftInfo) -> str | None:
    """Return the reason why ``server`` cannot run a draft that reads aux layers, or None."""
    if info.spec.method.drafts_blocks:
        return _block_refusal(server, info)
    if server == "vllm" or info.spec.method.reads_final_hidden:
        return None
    if info.spec.norm_before_residual:
        return "does not know <norm_before_residual>"
    if len(info.aux_layers) == 1:
        return "skips fc in a draft with a single aux layer"
    return None
