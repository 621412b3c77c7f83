"""A draft that starts as the base's last layers holds their Hugging Face weights, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.config import EagleConfig
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.testing.harness import megatron_parallel, run_distributed
from megatron_eagle.training.base_start import check_base_start
from tests.helpers.tiny_hf import SIZES, make_base

IDS = torch.tensor([2, 3, 7, 20, 31, 44, 60])
SIZES_OF_LAYERS = torch.tensor([1.0, 2.0, 6.0])
HIDDEN, GROUPS, HEADS = SIZES["hidden_size"], 4, 8
ATTENTION, MLP = "self_attention.linear_", "mlp.linear_"


def started(
    rank: int, world: int, directory: str, options: EagleConfig, sequence_parallel: bool
) -> dict[str, Tensor]:
    """This rank's parameters of a draft that started as the base in ``directory``."""
    groups = megatron_parallel(tp=world)
    from megatron_eagle.draft.build import build_draft
    from megatron_eagle.draft.layer_config import Rotary
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.teacher.build import base_config
    from megatron_eagle.training.base_start import BaseStart
    from megatron_eagle.training.warm_start import load_base_start

    info = load_base_json(directory)
    draft = build_draft(
        spec=options.spec, num_aux=3, backend=local_backend(), vocab_ids=IDS, vocab_size=61,
        base_config=base_config(info, world, sequence_parallel=sequence_parallel),
        base_head=torch.Tensor, base_head_rows=64, rotary=Rotary(torch.arange),
        metadata=torch.zeros(1, dtype=torch.uint8), pg_collection=groups,
        device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(7.0)
    load_base_start(draft, BaseStart(options.spec, info, directory, IDS), lambda: SIZES_OF_LAYERS)
    return dict(draft.named_parameters())


def query_groups(parts: list[Tensor], rank: int, world: int) -> Tensor:
    """This rank's rows of Megatron's order [q_1 .. q_r, k, v] of every group."""
    grouped = torch.cat([part.view(GROUPS, -1, HIDDEN) for part in parts], dim=1)
    return grouped.chunk(world)[rank].reshape(-1, HIDDEN)


def layer(
    theirs: dict[str, Tensor], ours: str, number: int, rank: int, world: int
) -> dict[str, Tensor]:
    """What this rank's draft layer ``ours`` holds of the base's layer ``number``; qkv apart."""
    of = {k.split(f"layers.{number}.")[1]: v for k, v in theirs.items() if f".{number}." in k}
    gate, up = (of[f"mlp.{name}_proj.weight"].chunk(world)[rank] for name in ("gate", "up"))
    return {
        f"{ours}{ATTENTION}proj.weight": of["self_attn.o_proj.weight"].chunk(world, 1)[rank],
        f"{ours}pre_mlp_layernorm.weight": of["post_attention_layernorm.weight"],
        f"{ours}{MLP}fc1.weight": torch.cat([gate, up]),
        f"{ours}{MLP}fc2.weight": of["mlp.down_proj.weight"].chunk(world, 1)[rank],
        "norm": of["input_layernorm.weight"],
        "qkv": query_groups([of[f"self_attn.{x}_proj.weight"] for x in "qkv"], rank, world),
    }


CASES = [
    pytest.param(1, "llama", {}, False, id="tp1-tied"),
    pytest.param(2, "llama", {"num_layers": 2}, False, id="tp2-two-layers"),
    pytest.param(2, "mistral", {"algorithm": "eagle3.1"}, True, id="tp2-sp-eagle3.1"),
    pytest.param(2, "qwen3", {"qk_layernorm": True, "num_layers": 2}, False, id="tp2-qk-norms"),
    pytest.param(2, "qwen2", {"norm_before_fc": True}, False, id="tp2-norm-before-fc"),
]


@pytest.mark.parametrize(("world", "family", "changes", "sequence_parallel"), CASES)
def test_every_shard_starts_as_the_base_s_layers(
    tmp_path: Path, world: int, family: str, changes: dict[str, Any], sequence_parallel: bool
) -> None:
    base = make_base(tmp_path / "hf", family, num_hidden_layers=7)
    import_base(tmp_path / "hf", tmp_path / "base")
    options = EagleConfig.of(init_from_base=True, draft_vocab_size=IDS.numel(), **changes)
    args = (str(tmp_path / "base"), options, sequence_parallel)
    theirs = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    for rank, found in enumerate(run_distributed(started, world, *args)):
        expected = {"norm.weight": theirs["model.norm.weight"]}
        for index in range(options.spec.num_layers):
            prefix, number = f"layers.{index}.", 7 - options.spec.num_layers + index
            expected |= layer(theirs, prefix, number, rank, world)
            if options.spec.qk_layernorm:
                for x in "qk":
                    base_name = f"model.layers.{number}.self_attn.{x}_norm.weight"
                    expected[f"{prefix}self_attention.{x}_layernorm.weight"] = theirs[base_name]
            norm, qkv = expected.pop("norm"), expected.pop("qkv")
            if index == 0:
                assert found.pop(f"{prefix}input_layernorm.embedding_norm.weight").eq(7.0).all()
                expected[f"{prefix}input_layernorm.hidden_norm.weight"] = norm
                qkv = torch.cat([torch.zeros_like(qkv), qkv], dim=1)
            else:
                expected[f"{prefix}input_layernorm.weight"] = norm
            expected[f"{prefix}{ATTENTION}qkv.weight"] = qkv
        rows = -(-IDS.numel() // world)
        head = theirs["lm_head.weight"][IDS][rank * rows : (rank + 1) * rows]
        expected["lm_head.weight"] = head
        found["lm_head.weight"] = found["lm_head.weight"][: head.shape[0]]
        # In front of fc, the norms took the size out.
        size = {"eagle3.1": 6.0, "eagle3": 1.0}[options.spec.algorithm]
        if options.spec.norm_before_fc:
            size = float((41 / 3) ** 0.5)
        fc = torch.cat([torch.zeros(HIDDEN, 2 * HIDDEN), size * torch.eye(HIDDEN)], dim=1)
        expected["fc.weight"] = fc if sequence_parallel else fc.chunk(world)[rank]
        fresh = {name for name in found if name.startswith(("fc_norm", "input_norm"))}
        assert set(found) - fresh == set(expected)
        for name, tensor in expected.items():
            assert found[name].equal(tensor), (name, rank)


BLOCKS = {"algorithm": "dflash", "mask_token": 1, "num_layers": 2}
BLOCK_CASES = [
    pytest.param(1, "llama", BLOCKS, False, id="tp1"),
    pytest.param(2, "qwen3", BLOCKS | {"algorithm": "dspark"}, True, id="tp2-sp-dspark-qk-norms"),
]


@pytest.mark.parametrize(("world", "family", "changes", "sequence_parallel"), BLOCK_CASES)
def test_a_block_draft_starts_as_the_base_s_layers(
    tmp_path: Path, world: int, family: str, changes: dict[str, Any], sequence_parallel: bool
) -> None:
    """Its qkv is not doubled, one norm stands before all layers' context, and the norms of queries
    and keys keep the base's size of both where the base has none."""
    base = make_base(tmp_path / "hf", family, num_hidden_layers=7)
    import_base(tmp_path / "hf", tmp_path / "base")
    options = EagleConfig.of(init_from_base=True, draft_vocab_size=IDS.numel(), **changes)
    args = (str(tmp_path / "base"), options, sequence_parallel)
    theirs = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    for rank, found in enumerate(run_distributed(started, world, *args)):
        fc = torch.cat([torch.zeros(HIDDEN, 2 * HIDDEN), torch.eye(HIDDEN)], dim=1)
        expected = {
            "norm.weight": theirs["model.norm.weight"],
            "hidden_norm.weight": theirs["model.layers.5.input_layernorm.weight"],
            "fc.weight": fc if sequence_parallel else fc.chunk(world)[rank],
        }
        for index, number in enumerate((5, 6)):
            prefix = f"layers.{index}."
            expected |= layer(theirs, prefix, number, rank, world)
            norm = expected.pop("norm")
            expected[f"{prefix}input_layernorm.weight"] = norm
            expected[f"{prefix}{ATTENTION}qkv.weight"] = expected.pop("qkv")
            for x in "qk":
                own = f"model.layers.{number}.self_attn.{x}_"
                if family == "qwen3":
                    size = theirs[f"{own}norm.weight"]
                else:
                    folded = theirs[f"{own}proj.weight"] * norm
                    heads = HEADS if x == "q" else GROUPS
                    size = folded.norm(dim=1).view(heads, -1).square().mean(0).sqrt()
                expected[f"{prefix}self_attention.{x}_layernorm.weight"] = size
        fresh = {name for name in found if name.startswith(("lm_head", "markov", "confidence"))}
        assert set(found) - fresh == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0, msg=name)
        assert all(found[name].eq(7.0).all() for name in fresh)


def test_queries_and_keys_that_need_norms_start_at_random(tmp_path: Path) -> None:
    """Qwen3's are of any size without their norms; its values are taken over."""
    base = make_base(tmp_path / "hf", "qwen3")
    import_base(tmp_path / "hf", tmp_path / "base")
    options = EagleConfig.of(init_from_base=True, draft_vocab_size=IDS.numel())
    name = "layers.0.self_attention.linear_qkv.weight"
    ranks = run_distributed(started, 2, str(tmp_path / "base"), options, False)
    whole = torch.cat([found[name] for found in ranks])
    groups = whole[:, HIDDEN:].unflatten(0, (GROUPS, -1, 12))
    values = base.state_dict()["model.layers.1.self_attn.v_proj.weight"]
    assert groups[:, -1].flatten(0, 1).equal(values)
    assert float(groups[:, :-1].std()) == pytest.approx(0.02, rel=0.05)
    assert not whole[:, :HIDDEN].any()


REFUSED = [
    ("llama", {"ffn_hidden_size": 96}, "--eagle-ffn-hidden-size 96, but the base has 80"),
    ("llama", {"num_attention_heads": 4}, "--eagle-num-attention-heads 4, but the base has 8"),
    ("llama", {"num_query_groups": 2}, "--eagle-num-query-groups 2, but the base has 4"),
    ("llama", {"num_layers": 3}, "--eagle-num-layers 3, but the base has 2 layers"),
    ("llama", {"qk_layernorm": True}, "but the base does not norm queries and keys"),
    ("mixtral", {}, "the base's last layer has experts"),
    ("deepseek_v3", {"num_attention_heads": 8}, "layers of multi-latent attention are not copied"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_layers_that_cannot_be_copied_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    make_base(tmp_path / "hf", family)
    import_base(tmp_path / "hf", tmp_path / "base")
    base = load_base_json(tmp_path / "base")
    with pytest.raises(ValueError, match=r"--eagle-init-from-base: ") as error:
        check_base_start(EagleConfig.of(init_from_base=True, **changes), base)
    assert message in str(error.value) and "\n" not in str(error.value)
