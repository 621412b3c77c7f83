"""A base's own next-token module: out of its files, back into a copy of them; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.cli import main as cli
from megatron_eagle.config import DraftSpec
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.base.stitch import stitch
from megatron_eagle.hf.draft.base_module import beside_base
from megatron_eagle.hf.draft.checkpoint import open_checkpoint_draft, write_draft_checkpoint
from megatron_eagle.hf.draft.export import export_draft
from megatron_eagle.hf.draft.import_hf import open_hf_draft
from megatron_eagle.hf.draft.module_files import check_module
from tests.helpers.module_base import (
    KINDS,
    make_module_base,
    name_in_file,
    prefix_of,
    random_module,
    tensors_of,
    write_shards,
)
from tests.helpers.tiny_hf import logits_of, make_base

COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        model, _ = make_module_base(folder / kind / "hf", kind)
        torch.save(logits_of(model, torch.arange(6)[None]), folder / kind / "logits.pt")
        import_base(folder / kind / "hf", folder / kind / "base")
    return folder


def module_of(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """The module's own tensors in the files of `directory`."""
    return {
        name: tensor
        for name, tensor in tensors_of(directory).items()
        if name.startswith(prefix_of(kind)) and not name.endswith(COPIES)
    }


def convert(hf: Path, base: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    """Import the module in `hf` and export it again: (checkpoint, directory)."""
    checkpoint, exported = folder / "checkpoint", folder / "exported"
    stored = open_hf_draft(hf, load_base_json(base), base_directory=base)
    write_draft_checkpoint(stored, checkpoint)
    export_draft(checkpoint, exported, **options)
    return checkpoint, exported


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, bases: Path, tmp_path: Path) -> None:
    """Every tensor comes back bit for bit, also through a checkpoint as a warm start; one tensor
    changed is seen."""
    checkpoint, exported = convert(bases / kind / "hf", bases / kind / "base", tmp_path)
    expected, found = module_of(kind, bases / kind / "hf"), tensors_of(exported)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    check_module(checkpoint, exported)
    again = open_checkpoint_draft(checkpoint)
    for key, load in open_hf_draft(exported, again.info.base).tensors.items():
        assert again.tensors[key]().equal(load()), key
    export_draft(checkpoint, exported, overwrite=True)
    name = name_in_file(kind, "joining.weight")
    found[name] = found[name].roll(1, 1)
    save_file(found, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"draft.fc.weight is not that of"):
        check_module(checkpoint, exported)


def test_half_precision_comes_back(bases: Path, tmp_path: Path) -> None:
    """In bf16 too, beside the routers' fp32 biases."""
    kind = "deepseek_v3"
    hf = tmp_path / "hf"
    shutil.copytree(bases / kind / "hf", hf)
    for file in hf.glob("*.safetensors"):
        tensors = {
            name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file)
    import_base(hf, tmp_path / "base")
    _, exported = convert(hf, tmp_path / "base", tmp_path, dtype=torch.bfloat16)
    found = tensors_of(exported)
    for name, tensor in module_of(kind, hf).items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_module_goes_into_a_copy_of_the_base(
    kind: str, bases: Path, tmp_path: Path
) -> None:
    """All other bytes of the copy are the base's; transformers and our own import read it as the
    base it was, our own import of modules as the trained one."""
    hf, base = bases / kind / "hf", bases / kind / "base"
    torch.manual_seed(1)
    trained = random_module(kind)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.25)
    module = {name_in_file(kind, name): p.detach() for name, p in trained.named_parameters()}
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    original = tensors_of(hf)
    write_shards(other, {n: t for n, t in original.items() if n not in module}, module)
    _, exported = convert(other, base, tmp_path)
    words = ["--hf", hf, "--module", exported, "--save", tmp_path / "stitched"]
    assert cli.main(["stitch", *map(str, words)]) == 0
    found = tensors_of(tmp_path / "stitched")
    assert set(found) == set(original)
    for name, tensor in found.items():
        assert tensor.equal(module.get(name, original[name])), name
    names = [file.name for file in hf.iterdir() if file.suffix != ".safetensors"]
    for name in names:
        assert (tmp_path / "stitched" / name).read_bytes() == (hf / name).read_bytes(), name
    info = import_base(tmp_path / "stitched", tmp_path / "again")
    assert info.fingerprint == load_base_json(base).fingerprint
    back = open_hf_draft(tmp_path / "stitched", info).tensors
    for key, load in open_hf_draft(other, load_base_json(base)).tensors.items():
        assert back[key]().equal(load()), key
    if kind != "mimo":  # which transformers has not
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "stitched").eval()
        expected = torch.load(bases / kind / "logits.pt")
        torch.testing.assert_close(
            logits_of(model, torch.arange(6)[None]), expected, rtol=1e-4, atol=1e-4
        )


def edited(hf: Path, folder: Path, **changes: Any) -> Path:
    """A copy of `hf`: tensors by name (None leaves one out), fields of config.json by `config`."""
    copy = folder / "edited"
    shutil.copytree(hf, copy)
    config = json.loads((copy / "config.json").read_text()) | changes.pop("config", {})
    (copy / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(copy) | changes.pop("tensors", {})
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    save_file({n: t for n, t in tensors.items() if t is not None}, copy / "model.safetensors")
    return copy


L = prefix_of("deepseek_v3")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "deepseek_v3",
        {"tensors": {f"{L}eh_proj.weight": None}},
        "no whole .*eh_proj.weight is",
    ),
    ("deepseek_v3", {"tensors": {f"{L}enorm.bias": torch.ones(48)}}, "enorm.bias is unknown in a"),
    ("deepseek_v3", {"tensors": {f"{L}enorm.weight": torch.ones(8)}}, "enorm.weight has shape"),
    (
        "deepseek_v3",
        {"tensors": {f"{L}shared_head.head.weight": torch.ones(61, 48)}},
        "shared_head.head.weight is not lm_head.weight, which training would use",
    ),
    (
        "deepseek_v3",
        {"tensors": {f"{L}hnorm.weight": torch.full((48,), torch.nan)}},
        "hnorm.weight holds NaN",
    ),
    ("deepseek_v3", {"config": {"num_nextn_predict_layers": 2}}, "num_nextn_predict_layers is 2;"),
    ("deepseek_v3", {"config": {"rms_norm_eps": 0.5}}, "norm_epsilon is 0.5, the base .* has"),
    ("glm4_moe", {"config": {"architectures": ["DeepseekV3ForCausalLM"]}}, "a deepseek_v3 model"),
    (
        "mimo",
        {"tensors": {"model.embed_tokens.weight": torch.ones(61, 48)}},
        "embed_tokens.weight is not that of",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED)
def test_no_module_of_this_base(
    kind: str, changes: dict[str, Any], reason: str, bases: Path, tmp_path: Path
) -> None:
    hf = edited(bases / kind / "hf", tmp_path, **changes)
    base = bases / kind / "base"
    with pytest.raises(UserError, match=reason):
        stored = open_hf_draft(hf, load_base_json(base), base_directory=base)
        for load in stored.tensors.values():
            load()


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("glm4_moe", {"num_layers": 2}, "num_layers 2: an mtp draft is one layer"),
    ("glm4_moe", {"attention": "mla"}, "attention mla: an mtp .*, which has gqa"),
    ("glm4_moe", {"num_experts": 4}, "num_experts 4: an mtp .*, which has 8"),
    ("mimo", {"qk_layernorm": True}, "qk_layernorm: an mtp .*, which has False"),
    ("mimo", {"ffn_hidden_size": 8}, "ffn_hidden_size 8: an mtp .*, which has 80"),
    ("mimo", {"aux_layers": (1,)}, "aux_layers 1: algorithm mtp reads the base's final"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), OPTIONS)
def test_the_base_says_what_the_layer_is(
    kind: str, options: dict[str, Any], reason: str, bases: Path
) -> None:
    args = load_base_json(bases / kind / "base").megatron_args
    with pytest.raises(UserError, match=reason):
        beside_base(DraftSpec(algorithm="mtp", **options), args)
    assert beside_base(DraftSpec(algorithm="mtp"), args).num_experts == args.get("num_experts")


def test_a_base_whose_layers_no_draft_has() -> None:
    with pytest.raises(UserError, match="the base has window_size = "):
        beside_base(DraftSpec(algorithm="mtp"), {"window_size": [4, 0]})


def test_other_formats_are_refused(bases: Path, tmp_path: Path) -> None:
    from megatron_eagle.hf.draft.formats import FORMATS

    with pytest.raises(UserError, match="format vllm: an mtp draft is a part of its base's"):
        convert(bases / "mimo" / "hf", bases / "mimo" / "base", tmp_path, fmt=FORMATS["vllm"])


def test_no_place_for_the_module(bases: Path, tmp_path: Path) -> None:
    """Another base's files, files without a module, quantized ones, and a directory that is no
    module."""
    hf, base, save = bases / "glm4_moe" / "hf", bases / "glm4_moe" / "base", tmp_path / "save"
    _, exported = convert(hf, base, tmp_path)

    def refused(where: Path, module: Path, reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            stitch(where, module, save, print)
        assert not save.exists()

    refused(hf, hf, "not of a converted next-token module")
    refused(bases / "mimo" / "hf", exported, "config.json: .* is .*, the base's")
    name = f"{prefix_of('glm4_moe')}enorm.weight"
    for number, (tensor, reason) in enumerate(
        {
            None: "has no .*enorm.weight, so there is no place",
            torch.ones(8): "enorm.weight has shape .*, the base's .8.",
            torch.ones(48, dtype=torch.float8_e4m3fn): "enorm.weight is F8_E4M3, quantized",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        refused(edited(hf, tmp_path / str(number), tensors={name: tensor}), exported, reason)
    more = {f"{prefix_of('glm4_moe')}new.weight": torch.ones(2)}
    refused(edited(hf, tmp_path, tensors=more), exported, "lacks .*new.weight, which the base's")


def test_a_family_without_modules_is_not_converted(tmp_path: Path) -> None:
    """Such a base can have a module trained beside it, for evaluation here; no server reads it."""
    from megatron_eagle.hf.draft.info import DraftInfo
    from megatron_eagle.hf.draft.module_entries import module_entries
    from megatron_eagle.hf.draft.module_files import check_has_names

    make_base(tmp_path / "hf", "llama")
    base = import_base(tmp_path / "hf", tmp_path / "base")
    info = DraftInfo(beside_base(DraftSpec(algorithm="mtp"), base.megatron_args), base, 3)
    assert any(entry.megatron == "draft.layers.0.mlp.linear_fc2.weight"
               for entry in module_entries(info))  # fmt: skip
    with pytest.raises(UserError, match="a llama base has no next-token module"):
        check_has_names(info, "checkpoint")
