"""What a checkpoint of Megatron's says of its model, read without running anything in it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_eagle.checkpoint.base_description import read_base, with_vocab_size
from megatron_eagle.checkpoint.native.architecture import architecture_args
from megatron_eagle.checkpoint.native.objects import read_common_state
from megatron_eagle.checkpoint.native.positions import rope_description, rope_of_config
from megatron_eagle.cli.describe_base import main as describe_base
from megatron_eagle.errors import UserError
from tests.helpers.native_files import (
    ARGS,
    BRIDGE_LLAMA,
    HIDDEN,
    LAYERS,
    VOCAB,
    chunk,
    namespace,
    save,
)

BRIDGE: dict[str, Any] = {
    **BRIDGE_LLAMA,
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B",
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 16,
    "rotary_base": 500000,
    "vocab_size": 20,
    "make_vocab_size_divisible_by": 8,
    "scale_factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}


class WritesAFile:
    """Unpickled by pickle, it writes the file ``ran``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name", ["iter_0000010", "release"])
def test_an_older_checkpoint_describes_its_model(name: str, tmp_path: Path) -> None:
    base = read_base(save(tmp_path / "model", namespace(), name=name))
    assert base.family == "megatron-gpt" and base.name == "model" and base.vocab_size == VOCAB
    assert base.source == "Megatron-LM checkpoint, iteration 10"
    assert base.tokenizer == {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "somewhere",
    }
    assert base.megatron_args["norm_epsilon"] == 1e-5 and base.megatron_args["swiglu"] is True
    assert base.hf_config["max_position_embeddings"] == 64
    assert read_base(tmp_path / "model" / name) == base
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        name, "latest_checkpointed_iteration.txt",
    }  # fmt: skip


def test_half_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    root = save(tmp_path / "model", namespace(), old=False)
    (shard,) = (root / "iter_0000010").glob("*.distcp")
    shard.unlink()
    with pytest.raises(UserError, match="shard file is missing") as error:
        read_base(root)
    assert str(shard) in str(error.value) and "\n" not in str(error.value)


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    prints = {
        read_base(save(tmp_path / name, namespace(), *more)).fingerprint
        for name, more in {"a": (), "b": (), "c": (chunk("decoder.x", 3),)}.items()
    }
    assert len(prints) == 2


def test_a_bridge_checkpoint_is_read_from_its_yaml(tmp_path: Path) -> None:
    root = save(tmp_path / "bridge", {"iteration": 7})
    content = {"model": BRIDGE, "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer"}}
    (root / "iter_0000010" / "run_config.yaml").write_text(yaml.safe_dump(content))
    base = read_base(root)
    assert base.source == "Megatron-Bridge checkpoint, iteration 7" and base.vocab_size == 20
    args = base.megatron_args
    assert args["swiglu"] and args["kv_channels"] == 2 and args["group_query_attention"]
    assert args["use_rope_scaling"] and args["rope_scaling_factor"] == 32.0
    assert base.hf_config["rope_scaling"]["factor"] == 32.0
    (root / "iter_0000010" / "run_config.yaml").write_text(
        f"model: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n"
    )
    with pytest.raises(UserError, match="not plain YAML"):
        read_base(root)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["common", "args", "shard"])
def test_code_in_a_common_state_is_refused_and_does_not_run(where: str, tmp_path: Path) -> None:
    evil = WritesAFile(tmp_path / "ran")
    common = {"args": argparse.Namespace(**ARGS, more=evil)} if where == "args" else {"args": evil}
    root = save(tmp_path / "model", common, old=where != "shard")
    with pytest.raises(UserError, match=r"refusing to unpickle posix\.system") as error:
        read_base(root)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_arguments_inside_the_shards_are_read(tmp_path: Path) -> None:
    root = save(tmp_path / "model", namespace(), old=False)
    state = read_common_state(root / "iter_0000010")
    assert state is not None and state["iteration"] == 10
    assert read_base(root).megatron_args["num_layers"] == LAYERS


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"padded_vocab_size": 32},
        "padded_vocab_size 32, but embedding.word_embeddings.weight has 24",
    ),
    ({"vocab_size": 25}, "vocab_size 25, but embedding.word_embeddings.weight has 24 rows"),
    ({"num_layers": 3}, "num_layers 3, but there are 2 layers"),
    ({"untie_embeddings_and_output_weights": False}, "but output_layer.weight is there"),
    ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant dsa"),
    ({"softmax_type": "off-by-one"}, "softmax_type off-by-one"),
    ({"position_embedding_type": "mrope"}, "position_embedding_type mrope"),
    ({"kv_channels": None}, "lack kv_channels"),
    ({"swiglu": False}, "lack bias_gelu_fusion|bias_gelu_fusion"),
    ({"num_query_groups": 3}, "3 do not divide 4 heads"),
    ({"hidden_size": "8"}, "hidden_size must be a positive integer"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_description_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = save(tmp_path / "model", namespace(**changes))
    with pytest.raises(UserError, match=message) as error:
        read_base(root)
    assert "\n" not in str(error.value)


def test_other_models_and_formats_name_the_way_out(tmp_path: Path) -> None:
    encoder = save(tmp_path / "t5", namespace(), chunk("encoder.layers.x", 2))
    (tmp_path / "torch" / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "torch" / "latest_checkpointed_iteration.txt").write_text("10")
    zarr = save(tmp_path / "zarr", namespace())
    (zarr / "iter_0000010" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    fsdp = save(tmp_path / "fsdp", namespace())
    (fsdp / "iter_0000010" / "metadata.json").unlink()
    empty = save(tmp_path / "empty", {"iteration": 3})
    for root, message in {
        encoder: "holds an encoder",
        tmp_path / "torch": "format 'torch' is not supported; Megatron-LM rewrites it",
        zarr: "sharded_backend 'zarr' is not supported, only 'torch_dist'; Megatron-LM rewrites it",
        fsdp: "fsdp_dtensor",
        empty: "holds no arguments of a model",
    }.items():
        with pytest.raises(UserError, match=message):
            read_base(root)


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    root = save(tmp_path / "model", namespace())
    path = root / "iter_0000010" / "common.pt"
    for content in (b"", b"PK", path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="common state cannot be read"):
            read_base(root)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps([1]))
    with pytest.raises(UserError, match="common state is no dictionary"):
        read_base(root)


def test_yarn_and_interpolation_become_descriptions() -> None:
    yarn = {**ARGS, "position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}
    assert architecture_args(yarn, "x")["position_embedding_type"] == "rope"
    description = rope_description({**yarn, "mscale": 0.5, "mscale_all_dim": 0.5}, "x")
    assert description["factor"] == 4.0 and description["attention_factor"] == 1.0
    linear = rope_description({**ARGS, "rotary_seq_len_interpolation_factor": 2}, "x")
    assert linear == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    scaled = architecture_args({**ARGS, "use_rope_scaling": True, "rope_scaling_factor": 32.0}, "x")
    assert scaled["rope_scaling_factor"] == 8.0, "Megatron-LM's trainer ignores its own flag"


def test_latent_attention_keeps_the_scale_of_its_scores() -> None:
    """Readers of an exported draft find mscale and mscale_all_dim where Megatron had them."""
    latent = {"multi_latent_attention": True, "mscale_all_dim": 0.8, "rotary_base": 10000}
    rope = rope_description({**ARGS, **latent, "rotary_scaling_factor": 4.0}, "x")
    scaling = rope_of_config(latent, rope, 0.7)["rope_scaling"]
    assert (scaling["mscale"], scaling["mscale_all_dim"]) == (0.7, 0.8)


def test_describe_base_writes_what_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path / "model", namespace())
    written = tmp_path / "description.json"
    words = [str(root), "--write", str(written), "--vocab-size", "20"]
    assert describe_base(words) == 0
    printed = capsys.readouterr().out
    assert "--num-layers 2" in printed and "tokenizer: HuggingFaceTokenizer" in printed
    base = read_base("nowhere", written)
    assert base.vocab_size == 20 and base == with_vocab_size(read_base(root), 20)
    assert describe_base([str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == VOCAB
    assert describe_base(words) == 2
    assert "--write" in capsys.readouterr().err
