"""Importing a base takes the memory of a few tensors, whatever the base's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
HIDDEN, FFN, LAYERS, VOCAB = 1024, 4096, 24, 4096
MEASURE = """
import resource, sys
from megatron_eagle.cli.import_base import main
assert main(["--hf", sys.argv[1], "--save", sys.argv[2]]) == 0
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_base(folder: Path, layers: int, packed: bool = False) -> int:
    """A Llama base of fp32 weights, or of FP8 ones in its layers, one file a layer; returns the
    bytes of the floats, in bf16 if packed."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    if packed:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if packed and file != "ends.safetensors":
            for name in [name for name, shape in shapes.items() if len(shape) == 2]:
                blocks = [side // 128 for side in shapes[name]]
                tensors[f"{name}_scale_inv"] = torch.rand(blocks)
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        return size // 2 if packed else size

    ends = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    size = save("ends.safetensors", ends)
    square, wide = (HIDDEN, HIDDEN), (FFN, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": wide for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = wide[::-1]
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN,) for norm in norms}
        size += save(f"layer-{layer}.safetensors", shapes)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def peak(hf: Path, save: Path) -> int:
    """Bytes resident at most while a process imports ``hf``."""
    command = [sys.executable, "-c", MEASURE, str(hf), str(save)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return 1024 * int(run.stdout.split("PEAK")[1])


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    write_base(tmp_path / "small", 1)
    size = write_base(tmp_path / "large", LAYERS)
    grown = peak(tmp_path / "large", tmp_path / "b") - peak(tmp_path / "small", tmp_path / "a")
    assert size > 1.5e9
    assert grown < 0.1 * size, f"{grown / 2**20:.0f} MiB more for {size / 2**20:.0f} MiB"


@pytest.mark.slow
def test_unpacking_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    """Against a small base of plain weights, which unpacks nothing."""
    write_base(tmp_path / "small", 1)
    size = write_base(tmp_path / "large", LAYERS, packed=True)
    grown = peak(tmp_path / "large", tmp_path / "b") - peak(tmp_path / "small", tmp_path / "a")
    assert size > 0.75e9
    assert grown < 0.1 * size, f"{grown / 2**20:.0f} MiB more for {size / 2**20:.0f} MiB"
