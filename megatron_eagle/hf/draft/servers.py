"""The servers: which bases they serve drafts of, and how they count the layers of these bases.

Read in the sources of the versions named here; ``make test-readers`` compares these tables with
vLLM's and SGLang's own files. TensorRT-LLM takes the layers as an argument; which bases it gives
auxiliary hidden states of was not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.tables.rope import rope_fields, rope_kind


@dataclass(frozen=True)
class Server:
    """A server that reads exported drafts.

    Attributes:
        title: its name as people write it.
        version: the release whose sources were read; empty if none is meant.
        aux_states: architectures of the bases of which it gives auxiliary hidden states; None if
            unknown.
        final_state: the same of the final hidden state, embedding and output layer.
    """

    title: str
    version: str
    aux_states: frozenset[str] | None
    final_state: frozenset[str] | None

    @property
    def release(self) -> str:
        """Return title and version."""
        return f"{self.title} {self.version}".strip()


_BOTH = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Qwen3Next",
        "GptOss",
        "DeepseekV2",
        "DeepseekV3",
    )
)
SERVERS = {
    "vllm": Server(
        "vLLM",
        "0.33.0",
        aux_states=_BOTH | {"Qwen3_5ForCausalLM"},
        final_state=_BOTH
        | {
            "Qwen3_5ForCausalLM",
            "MixtralForCausalLM",
            "Glm4MoeForCausalLM",
            "Glm4MoeLiteForCausalLM",
        },
    ),
    "sglang": Server(
        "SGLang",
        "0.5.23",
        aux_states=_BOTH | {"Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"},
        final_state=_BOTH | {"Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "MiMoForCausalLM"},
    ),
    "trtllm": Server("TensorRT-LLM", "", aux_states=None, final_state=None),
}
COUNTS_FROM_FIRST = frozenset(
    {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"}
)
"""Bases whose aux layers SGLang takes as outputs of layers if the first id is 1, and otherwise as
states after so many layers; of all other bases an id is the output of a layer."""
GIVES_LAST_OUTPUT = frozenset({"GptOssForCausalLM"})
"""Bases whose last layer's output SGLang gives; of others it never captures it."""


def architecture_of(base: BaseInfo) -> str | None:
    """Return the class name in the base's config.json, or None where there is none."""
    names = base.hf_config.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 else None


def sglang_ids(base: BaseInfo, outputs: Sequence[int]) -> list[int] | None:
    """Return the ids by which SGLang captures the ``outputs`` of these layers of ``base``.

    None if it cannot be told to: where it takes ids for states after layers, the first state of 1
    makes it take them all for outputs.
    """
    if architecture_of(base) not in COUNTS_FROM_FIRST or outputs[0] == 1:
        return list(outputs)
    return None if outputs[0] == 0 else [i + 1 for i in outputs]


def outputs_of_inner_ids(base: BaseInfo, ids: Sequence[int]) -> list[int]:
    """Return the layers that servers capture for the ids in ``eagle_config``: see ``sglang_ids``,
    whose inverse this is."""
    as_states = architecture_of(base) in COUNTS_FROM_FIRST and ids[0] != 1
    return [i - 1 for i in ids] if as_states else list(ids)


def base_reason(server: str, info: DraftInfo) -> str | None:
    """Return why ``server`` has no place for a draft of this kind beside its base, or None."""
    about, architecture = SERVERS[server], architecture_of(info.base)
    reads_final = info.spec.method.reads_final_hidden
    known = about.final_state if reads_final else about.aux_states
    if known is None or architecture is None or architecture in known:
        return None
    states = "no final hidden state" if reads_final else "no auxiliary hidden states"
    return f"{about.release} gives a draft {states} of a {architecture} base"


def capture_reason(server: str, info: DraftInfo) -> str | None:
    """Return why no config.json makes ``server`` capture this draft's aux layers, or None."""
    outputs, architecture = info.aux_layers, architecture_of(info.base)
    if server != "sglang" or not outputs:
        return None
    release = SERVERS[server].release
    last = info.base.megatron_args["num_layers"] - 1
    if outputs[-1] == last and architecture not in GIVES_LAST_OUTPUT:
        return f"{release} never captures the output of a base's last layer, {last} here"
    if not info.spec.method.drafts_blocks and sglang_ids(info.base, outputs) is None:
        return (
            f"{release} cannot be told to capture the output of layer 0 first beside a "
            f"{architecture} base"
        )
    return None


def needs_own_ids(server: str, info: DraftInfo) -> bool:
    """Return whether ``server`` must be given other layer ids than those that the rest take."""
    # Of block drafts, SGLang takes all ids for outputs of layers.
    if server != "sglang" or not info.aux_layers or info.spec.method.drafts_blocks:
        return False
    return sglang_ids(info.base, info.aux_layers) != list(info.aux_layers)


def serving_notes(info: DraftInfo, servers: Sequence[str] = tuple(SERVERS)) -> list[str]:
    """Return what ``servers`` cannot do with this draft or do in one way only, one line each."""
    if info.spec.method.is_base_module:
        return []
    reasons = [
        reason
        for server in servers
        for reason in (base_reason(server, info), capture_reason(server, info))
        if reason is not None
    ]
    return reasons + (_vllm_notes(info) if "vllm" in servers else [])


def _vllm_notes(info: DraftInfo) -> list[str]:
    release = SERVERS["vllm"].release
    notes = []
    if info.spec.method.parallel_drafting:
        notes.append(
            f"{release} drafts in parallel in its first model runner alone, which it chooses by "
            "itself unless VLLM_USE_V2_MODEL_RUNNER=1"
        )
    base = info.base
    plain = base.megatron_args.get("multi_latent_attention") and not info.spec.uses_mla
    if not plain and rope_kind(rope_fields(base.hf_config, f"base {base.name}")) == "yarn":
        notes.append(
            f"{release} serves the base up to this draft's max_position_embeddings and no "
            "further: it does not extend rope of type yarn"
        )
    return notes
