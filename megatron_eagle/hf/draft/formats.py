"""The formats that a draft is exported in, and the drafts that each server can run.

A server that ignores a flag, or skips a tensor because of its name, drafts wrongly without an
error. So every reason not to write a format is a line here or in an algorithm's ``refusals``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.servers import (
    SERVERS,
    architecture_of,
    base_reason,
    capture_reason,
    needs_own_ids,
    serving_notes,
)


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
        know its algorithm at all. None reads a next-token module beside its base's files."""
        if info.spec.method.is_base_module:
            return ()
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
WITHOUT_BLOCKS = {"sglang": ("Qwen2ForCausalLM", "MixtralForCausalLM", "Glm4MoeForCausalLM")}
"""Server -> bases that it captures hidden states of for EAGLE drafts, if at all, and not for block
drafts."""


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
            return f"{SERVERS[server].title} {reason}"
    return capture_reason(fmt.servers[0], info) if len(fmt.servers) == 1 else None


def servers_of(fmt: Format, info: DraftInfo) -> tuple[tuple[str, ...], list[str]]:
    """Return the readers of ``fmt`` that serve this draft beside its base, and what keeps the
    others from it."""
    usable, reasons = [], []
    for server in fmt.readers(info):
        reason = base_reason(server, info) or capture_reason(server, info)
        if reason is None and len(fmt.servers) > 1 and needs_own_ids(server, info):
            reason = (
                f"{SERVERS[server].release} counts the layers of this base otherwise: it needs a "
                f"directory of format {server}"
            )
        if reason is None:
            usable.append(server)
        else:
            reasons.append(reason)
    return tuple(usable), reasons


def format_notes(fmt: Format, info: DraftInfo) -> list[str]:
    """Return what to know before serving this draft from ``fmt``, one line each."""
    reasons = servers_of(fmt, info)[1]
    return list(dict.fromkeys([*reasons, *serving_notes(info, fmt.readers(info))]))


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
            return f"{SERVERS[server].title} does not know <norm_before_fc> in an MLA draft"
        if info.num_layers > 1 and server == "sglang":
            return "SGLang runs MLA drafts of one layer alone"
    return None


def _block_refusal(server: str, info: DraftInfo) -> str | None:
    """Return the reason why ``server`` cannot run a block draft, or None."""
    architecture = architecture_of(info.base)
    if architecture in WITHOUT_BLOCKS.get(server, ()):
        return f"captures nothing for block drafts of a {architecture} base"
    if server == "vllm" and info.spec.markov and info.spec.markov[0] != "vanilla":
        return f"knows no <markov_head> {info.spec.markov[0]}, only vanilla"
    if server == "sglang" and info.compressed:
        return "has no vocabulary map for block drafts: it would draft other tokens"
    return None


def _server_refusal(server: str, info: DraftInfo) -> str | None:
    """Return the reason why ``server`` cannot run a draft that reads aux layers, or None."""
    if info.spec.method.drafts_blocks:
        return _block_refusal(server, info)
    if server == "vllm" or info.spec.method.reads_final_hidden:
        return None
    if info.spec.qk_layernorm:
        return "has no norms of a draft's queries and keys (<qk_layernorm>)"
    if info.spec.norm_before_residual:
        return "does not know <norm_before_residual>"
    if len(info.aux_layers) == 1:
        return "skips fc in a draft with a single aux layer"
    return None
