"""Converting a trained draft: every tensor, the configuration, the model card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_eagle.cli.convert import main as convert
from megatron_eagle.hf.draft.export import export_draft
from tests.helpers.trained_draft import TrainedDraft
from tests.helpers.trained_mla import MLA_SIZES
from tests.reference.eagle3 import ReferenceEagle3

ROOT = Path(__file__).parents[2]


WIDE = {"ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16}
WIDE_MLA = {"ffn_hidden_size": 96, "q_lora_rank": 30, "kv_lora_rank": 40, "v_head_dim": 8}
LAYOUTS = [
    pytest.param({}, id="one-layer"),
    pytest.param({"layers": 3}, id="three-layers"),
    pytest.param({"groups": 6}, id="multi-head"),
    pytest.param({"groups": 1}, id="multi-query"),
    pytest.param({"draft_vocab": 53, "padded_vocab": 64}, id="whole-vocabulary"),
    pytest.param({"padded_vocab": 19, "aux_layers": (3, 7)}, id="no-padding-two-captures"),
    pytest.param({"algorithm": "eagle3.1", "layers": 2}, id="eagle3.1-two-layers"),
    pytest.param({"norm_before_fc": True}, id="norm-before-fc"),
    pytest.param({"base": WIDE}, id="own-widths"),
    pytest.param({"mla": MLA_SIZES, "algorithm": "eagle3.1"}, id="mla-eagle3.1"),
    pytest.param({"mla": MLA_SIZES, "base": WIDE_MLA}, id="mla-own-widths"),
]


@pytest.mark.parametrize("changes", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 4])
def test_every_tensor_is_exported_bit_by_bit(
    tmp_path: Path, changes: dict[str, Any], parts: int
) -> None:
    draft = TrainedDraft.make(**changes)
    draft.save(tmp_path / "ckpt", parts)
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(found) == set(draft.hf)
    for name, expected in draft.hf.items():
        assert found[name].dtype == expected.dtype, name
        assert found[name].equal(expected), name
    embedding = torch.randn(draft.shape.vocab, draft.shape.hidden)
    model = ReferenceEagle3.from_hf(tmp_path / "hf", embedding)
    assert model.vocab_ids.equal(draft.stored["draft.vocab_ids"])
    assert model.config.num_aux == len(draft.shape.aux_layers)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_asked_dtype(
    tmp_path: Path, saved: torch.dtype, asked: torch.dtype | None
) -> None:
    draft = TrainedDraft.make(saved)
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf", dtype=asked)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, expected in draft.hf.items():
        written = expected.dtype if name in ("d2t", "t2d") else asked or saved
        assert found[name].dtype == written and found[name].equal(expected.to(written)), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(asked or saved)


def test_the_config_describes_the_draft(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 14,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "vocab_size": 53,
        "draft_vocab_size": 19,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "max_position_embeddings": 4096,
        "rope_theta": 50000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [2, 5, 8],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 4, 7],
            "use_aux_hidden_state": True,
        },
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 50000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        {"rope_theta": 50000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 50000.0}},
    ],
)
def test_transformers_reads_the_same_rope_as_of_the_base(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    draft = TrainedDraft.make(rope=rope)
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    scaled = "llama3" in str(rope)
    assert written["rope_theta"] == 50000.0 and written.get("rope_scaling") == (
        LLAMA3 if scaled else None
    )
    (tmp_path / "base").mkdir()
    base = {"model_type": "llama", "max_position_embeddings": 4096, **rope}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    found = AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    assert found == AutoConfig.from_pretrained(tmp_path / "base").rope_parameters
    assert found["rope_theta"] == 50000.0


def test_the_model_card_names_base_and_layers(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in (
        "tiny-base",
        "1, 4, 7",
        "iter_0000120",
        '"num_speculative_tokens": 4}',
        "--speculative-num-draft-tokens 5",
        "eagle3_layers_to_capture: [1, 4, 7]",
        "it ran no server",
    ):
        assert text in card
    assert str(tmp_path) not in card


def test_padding_rows_may_hold_anything(tmp_path: Path) -> None:
    draft = TrainedDraft.make()
    draft.stored["draft.lm_head.weight"][19:] = float("nan")
    draft.save(tmp_path / "ckpt")
    export_draft(tmp_path / "ckpt", tmp_path / "hf")


def convert_to_hf(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/convert_to_hf.py", *map(str, args)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_command_exports_a_draft(tmp_path: Path) -> None:
    draft = TrainedDraft.make(torch.bfloat16)
    draft.save(tmp_path / "ckpt")
    arguments = ("--load", tmp_path / "ckpt", "--output", tmp_path / "hf", "--dtype", "float32")
    done = convert_to_hf(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"EAGLE-3 draft for 'tiny-base' is in {tmp_path / 'hf'}"
    again = convert_to_hf(*arguments)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert again.stderr.startswith("error: --output ")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found["fc.weight"].equal(draft.hf["fc.weight"].float())


def test_a_hugging_face_config_says_what_a_native_base_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``convert --hf-config DIR``: class and special tokens of the served base; both must agree."""
    draft = TrainedDraft.make()
    base = draft.metadata["base"]
    whole = {**base["hf_config"], "vocab_size": base["vocab_size"]}
    arguments = base["megatron_args"]
    whole |= {
        "hidden_size": arguments["hidden_size"],
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": arguments["num_attention_heads"],
    }
    known = ("architectures", "bos_token_id", "eos_token_id")
    base |= {
        "family": "megatron-gpt",
        "source": "Megatron-LM checkpoint, iteration 10",
        "hf_config": {n: v for n, v in base["hf_config"].items() if n not in known},
    }
    draft.save(tmp_path / "ckpt")
    words = ["--load", str(tmp_path / "ckpt"), "--output"]
    assert convert([*words, str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert "eos_token_id" not in alone

    def with_config(name: str, **changes: Any) -> int:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**whole, **changes}))
        hf = ["--hf-config", str(tmp_path / name)]
        return convert([*words, str(tmp_path / f"{name}_out"), *hf])

    assert with_config("agrees") == 0
    added = json.loads((tmp_path / "agrees_out" / "config.json").read_text())
    assert added == {**alone, "bos_token_id": 1, "eos_token_id": [2, 3]}
    capsys.readouterr()
    for name, changes, message in (
        ("wide", {"hidden_size": 8}, "hidden_size is 8, the base of this draft has"),
        ("rope", {"rope_theta": 7.0}, "rope"),
    ):
        assert with_config(name, **changes) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --hf-config ") and message in error
        assert not (tmp_path / f"{name}_out").exists()
    assert convert([*words, str(tmp_path / "none"), "--hf-config", str(tmp_path / "no")]) == 2
    assert "--hf-config" in capsys.readouterr().err
