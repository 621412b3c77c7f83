"""The oracle against second writings of itself: per-key loops, hand sums, finite differences."""

from __future__ import annotations

import cmath
import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.decode import draft_chain
from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3
from tests.reference.layers import query_aligned_mask
from tests.reference.losses import row_loss, soft_cross_entropy

BATCH, LENGTH = 2, 6
CONFIG = ReferenceConfig(
    hidden_size=8, target_hidden_size=6, intermediate_size=12, num_heads=4, num_kv_heads=2,
    head_dim=4, vocab_size=11, draft_vocab_size=5, num_aux=2, rope_theta=100.0, ttt_steps=3,
)  # fmt: skip
VOCAB_IDS = torch.tensor([1, 2, 5, 6, 10])


def build(**changes: Any) -> ReferenceEagle3:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **changes)
    embed = torch.randn(config.vocab_size, config.hidden_size)
    model = ReferenceEagle3(config, embed, VOCAB_IDS).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of one hide a swapped or missing norm
                parameter.uniform_(0.5, 1.5)
            elif "proj" in name:
                parameter.mul_(3)  # near-uniform attention hides a wrong key
    return model


def batch() -> dict[str, Tensor]:
    g, shape = torch.Generator().manual_seed(1), (BATCH, LENGTH)
    width = CONFIG.num_aux * CONFIG.target_hidden_size
    return {
        "aux": torch.randn(*shape, width, generator=g).double(),
        "tokens": torch.randint(CONFIG.vocab_size, shape, generator=g),
        "base_logits": 2 * torch.randn(*shape, CONFIG.vocab_size, generator=g).double(),
        "loss_mask": torch.ones(shape),
    }


def rms(x: Tensor, norm: Any) -> Tensor:
    return x * norm.weight / math.sqrt(float((x * x).mean()) + CONFIG.rms_eps)


def spin(x: Tensor, position: int) -> Tensor:
    """RoPE of one head as complex rotation: component i pairs with i + head_dim / 2."""
    half = len(x) // 2
    z = [
        complex(x[i], x[i + half]) * cmath.exp(1j * position * CONFIG.rope_theta ** (-i / half))
        for i in range(half)
    ]
    return torch.tensor([c.real for c in z] + [c.imag for c in z], dtype=torch.float64)


def loop_logits(model: ReferenceEagle3, aux: Tensor, tokens: Tensor, row: int, step: int) -> Tensor:
    """Draft logits of one row [D]: recursion over rows, steps and layers, one key at a time."""
    blocks, size = list(model.blocks()), CONFIG.head_dim
    share = CONFIG.num_heads // CONFIG.num_kv_heads

    @cache
    def normed(layer: int, p: int, t: int) -> Tensor:
        block: Any = blocks[layer]
        if layer > 0:
            return rms(output(layer - 1, p, t), block.input_layernorm)
        hidden = entering(0, p, t)
        if model.config.eagle1:
            return hidden
        embedding = model.embed_weight[tokens[p + 1 + t]]
        return torch.cat([rms(embedding, block.input_layernorm), rms(hidden, block.hidden_norm)])

    def entering(layer: int, p: int, t: int) -> Tensor:
        if layer > 0:
            return output(layer - 1, p, t)
        if model.config.eagle1:
            hidden = output(len(blocks) - 1, p, t - 1) if t else aux[p]
            return model.fc.weight @ torch.cat([model.embed_weight[tokens[p + 1 + t]], hidden])
        if t == 0:
            return model.fc.weight @ features(p)
        before = output(len(blocks) - 1, p, t - 1)
        return rms(before, model.norm) if model.config.norm_output else before

    def features(p: int) -> Tensor:
        parts = list(aux[p].split(CONFIG.target_hidden_size))
        if model.config.fc_norm:
            parts = [rms(x, norm) for x, norm in zip(parts, model.fc_norm, strict=True)]
        joined = torch.cat(parts)
        return rms(joined, model.input_norm) if model.config.norm_before_fc else joined

    @cache
    def output(layer: int, p: int, t: int) -> Tensor:
        block: Any = blocks[layer]
        attn, heads = block.self_attn, []
        seen = [(i, 0) for i in range(p + 1)] + [(p, j) for j in range(1, t + 1)]
        for head in range(CONFIG.num_heads):
            mine = slice(head * size, (head + 1) * size)
            group = slice(head // share * size, (head // share + 1) * size)
            q = spin((attn.q_proj.weight @ normed(layer, p, t))[mine], p + t)
            total, mixed = 0.0, torch.zeros(size, dtype=torch.float64)
            for i, j in seen:
                x = normed(layer, i, j)
                key = spin((attn.k_proj.weight @ x)[group], i + j)
                weight = math.exp(float(q @ key) / math.sqrt(size))
                total, mixed = total + weight, mixed + weight * (attn.v_proj.weight @ x)[group]
            heads.append(mixed / total)
        residual = entering(layer, p, t)
        if layer == 0 and model.config.norm_before_residual:
            residual = rms(residual, block.hidden_norm)
        middle = residual + attn.o_proj.weight @ torch.cat(heads)
        x = rms(middle, block.post_attention_layernorm)
        gate = block.mlp.gate_proj.weight @ x
        return middle + block.mlp.down_proj.weight @ (
            gate / (1 + torch.exp(-gate)) * (block.mlp.up_proj.weight @ x)
        )

    last = output(len(blocks) - 1, row, step)
    return model.lm_head.weight @ (last if model.config.eagle1 else rms(last, model.norm))


EAGLE1 = {"eagle1": True, "num_aux": 1, "target_hidden_size": CONFIG.hidden_size}
VARIANTS = [
    {"ttt_steps": 1},
    {},
    {"num_layers": 2},
    {**EAGLE1, "num_layers": 2},
    {"fc_norm": True, "norm_output": True},
    {"norm_before_fc": True, "norm_before_residual": True, "num_layers": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_every_row_and_step_equals_the_loop_over_keys(changes: dict[str, Any]) -> None:
    model, data = build(**changes), batch()
    steps = model.config.ttt_steps
    width = model.config.num_aux * model.config.target_hidden_size
    data["aux"] = data["aux"][..., :width]
    logits = model.forward_ttt(**data)["logits"]
    for step in range(steps):
        for row in range(LENGTH - 1 - step):
            expected = loop_logits(model, data["aux"][1], data["tokens"][1], row, step)
            torch.testing.assert_close(logits[step, 1, row], expected, rtol=1e-9, atol=1e-9)


def test_the_mask_of_the_third_step_equals_one_made_by_hand() -> None:
    rows = ["100 100 100", "110 010 010", "111 001 001"]
    expected = [[c == "1" for c in row.replace(" ", "")] for row in rows]
    assert query_aligned_mask(3, 2).tolist() == expected


def test_layers_after_the_first_are_llama_layers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    layer: Any = list(build(num_layers=2).blocks())[1]
    config = llama.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, rms_norm_eps=CONFIG.rms_eps, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
    )  # fmt: skip
    twin = llama.LlamaDecoderLayer(config, layer_idx=0).double()
    twin.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    rotary = llama.LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    theirs = twin(x, attention_mask=mask, position_embeddings=rotary)
    ours = layer(x, x, [])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # their cos and sin are fp32


def test_loss_mask_names_the_consumed_token_and_ends_with_the_sequence() -> None:
    data = batch()
    data["loss_mask"] = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    out = build().forward_ttt(**data)
    rows = [[r.nonzero().flatten().tolist() for r in step] for step in out["valid_rows"]]
    assert rows == [
        [[2, 3], [0, 1, 2, 3, 4]],  # x_6 of row 5 does not exist, though mask[5] is set
        [[1, 2], [0, 1, 2, 3]],
        [[0, 1], [0, 1, 2]],
    ]
    assert out["counts"].tolist() == [7, 6, 5]


def test_loss_is_the_textbook_sum_over_one_normaliser() -> None:
    model, data = build(step_decay=0.5), batch()
    data["loss_mask"][0, :3] = 0
    with torch.no_grad():
        out = model.forward_ttt(**data)
    sums = [0.0, 0.0, 0.0]
    for t in range(3):
        for b in range(BATCH):
            for p in range(LENGTH - 1 - t):
                if data["loss_mask"][b, p + t] == 0:
                    continue
                teacher = [math.exp(data["base_logits"][b, p + 1 + t, i]) for i in VOCAB_IDS]
                draft = [math.exp(z) for z in out["logits"][t, b, p]]
                for pi, qi in zip(teacher, draft, strict=True):
                    sums[t] -= pi / sum(teacher) * math.log(qi / sum(draft))
    assert out["loss_sums"].tolist() == pytest.approx(sums, rel=1e-9)
    assert out["counts"].tolist() == [7, 6, 5]
    assert float(out["loss"]) == pytest.approx((sums[0] + sums[1] / 2 + sums[2] / 4) / 7, rel=1e-9)


def test_row_losses_equal_those_computed_by_hand() -> None:
    """Draft vocabulary {0, 2} of a base of three tokens; q = (.7, .3), the base (.5, .3, .2)."""
    q = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log() + 5
    base = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log() - 2
    ids = torch.tensor([0, 2])
    alpha, p = 0.5 + 0.2, (5 / 7, 2 / 7)
    kl = -(p[0] * math.log(0.7) + p[1] * math.log(0.3))
    expected = {
        "kl": kl,
        "ce": -math.log(0.7),
        "reverse-kl": 0.7 * math.log(0.7 / p[0]) + 0.3 * math.log(0.3 / p[1]),
        "tv": 1 - alpha,
        "lk-alpha": -math.log(alpha),
        "lk-lambda": math.exp(-2 * alpha) * kl + (1 - math.exp(-2 * alpha)) * (1 - alpha),
    }
    for name, value in expected.items():
        assert float(row_loss(name, q, base, ids, 2.0)) == pytest.approx(value, rel=1e-9), name


def test_no_supervised_row_is_a_zero_loss() -> None:
    data = batch()
    data["loss_mask"].zero_()
    assert build().forward_ttt(**data)["loss"].item() == 0.0


def test_prefixes_end_at_the_first_miss_of_a_start_row() -> None:
    model = build(ttt_steps=2)
    base = torch.zeros(1, 5, CONFIG.vocab_size).double()
    base[0, :, 5] = 1.0  # draft token 2 everywhere
    draft = torch.zeros(2, 1, 5, 5).double()
    draft[0, 0, :, 2] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])  # rows 0 and 2 hit
    draft[1, 0, :, 2] = 1.0  # all hit
    draft[:, 0, :, 0] = 0.5
    out = model.objective(draft, base, torch.ones(1, 5))
    assert out["counts"].tolist() == [4, 3] and out["hits"].tolist() == [2, 3]
    assert out["prefixes"].tolist() == [2, 2]  # row 1 had missed before
    masked = model.objective(draft, base, torch.tensor([[1, 0, 1, 1, 1]]))
    assert masked["prefixes"].tolist() == [2, 1]  # row 0's second step is not supervised


def test_regression_is_the_smooth_l1_to_the_hidden_one_further() -> None:
    model, data = build(**EAGLE1, ttt_steps=1, regression=3.0), batch()
    data["aux"] = 2 * data["aux"][..., : CONFIG.hidden_size]
    data["loss_mask"] = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    with torch.no_grad():
        out = model.forward_ttt(**data)
        outputs = model.step(data["aux"], data["tokens"].roll(-1, 1), [[]])
    total = 0.0
    for b, p in ((0, 1), (1, 3)):
        for ours, wanted in zip(outputs[b, p], data["aux"][b, p + 1], strict=True):
            error = abs(float(ours - wanted))
            total += (0.5 * error**2 if error < 1 else error - 0.5) / CONFIG.hidden_size
    assert float(out["regression_sums"]) == pytest.approx(total, rel=1e-9)
    expected = (float(out["loss_sums"]) + 3 * total) / 2
    assert float(out["loss"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_outside_the_draft_vocabulary_are_no_hits(masked: bool) -> None:
    model = build(mask_out_of_vocab=masked, ttt_steps=1)
    base = torch.zeros(1, 5, CONFIG.vocab_size).double()
    base[0, 1, [2, 5]] = 1.0  # a tie: token 2, draft token 1
    base[0, 2, 3] = 1.0  # outside
    base[0, 3, 10] = 1.0  # draft token 4
    base[0, 4, 5] = 1.0  # draft token 2
    draft = torch.zeros(1, 1, 5, 5).double()
    draft[0, 0, 0, [1, 3]] = 1.0  # a tie: draft token 1, a hit
    draft[0, 0, 1, 3] = 1.0
    draft[0, 0, 2, 4] = 1.0  # a hit
    draft[0, 0, 3, 4] = 1.0  # a miss
    out = model.objective(draft, base, torch.ones(1, 5))
    assert out["counts"].tolist() == [3 if masked else 4]
    assert out["hits"].tolist() == [2]
    assert out["prefixes"].tolist() == [2]
    assert out["hit_rows"][0, 0].tolist() == [True, False, True, False, False]
    outside = soft_cross_entropy(draft[0, 0, 1], base[0, 2, VOCAB_IDS])
    without = model.objective(draft, base, torch.tensor([[1, 0, 1, 1, 1]]))["loss_sums"]
    expected = 0.0 if masked else outside.item()
    assert (out["loss_sums"] - without).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["fc.weight", "midlayer.self_attn.k_proj.weight"])
def test_gradient_through_all_steps_equals_finite_differences(name: str) -> None:
    model, data = build(), batch()
    parameter = model.get_parameter(name)
    (gradient,) = torch.autograd.grad(model.forward_ttt(**data)["loss"], parameter)
    eps = 1e-6
    for index in [(0, 0), (3, 7), (-1, -1)]:
        values = []
        for sign in (eps, -2 * eps):
            with torch.no_grad():
                parameter[index] += sign
                values.append(model.forward_ttt(**data)["loss"].item())
        with torch.no_grad():
            parameter[index] += eps
        slope = (values[0] - values[1]) / (2 * eps)
        assert float(gradient[index]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_detached_steps_change_the_gradient_and_nothing_else() -> None:
    data = batch()
    full, cut = build(), build(detach_steps=True)
    loss, cut_loss = (m.forward_ttt(**data)["loss"] for m in (full, cut))
    assert loss.equal(cut_loss)
    (grad,) = torch.autograd.grad(loss, full.fc.weight)
    (cut_grad,) = torch.autograd.grad(cut_loss, cut.fc.weight)
    assert float((grad - cut_grad).norm() / grad.norm()) > 0.01


@pytest.mark.parametrize("changes", VARIANTS[1:], ids=str)
@torch.no_grad()
def test_chain_equals_the_training_row_that_consumes_its_drafts(changes: dict[str, Any]) -> None:
    model, data, n, steps = build(**changes), batch(), 3, 3
    width = model.config.num_aux * model.config.target_hidden_size
    tokens, aux = data["tokens"][0, : n + 1], data["aux"][0, :n, :width]
    ids, logits = draft_chain(model, tokens, aux, steps)
    assert ids.equal(VOCAB_IDS[logits.argmax(-1)])
    row = torch.cat([tokens, ids])[None]
    padding = torch.zeros(1, row.shape[1] - n, aux.shape[1]).double()
    base = torch.zeros(1, row.shape[1], CONFIG.vocab_size).double()
    rows = model.forward_ttt(torch.cat([aux[None], padding], dim=1), row, base, row * 0)["logits"]
    torch.testing.assert_close(logits, rows[:, 0, n - 1], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="want n \\+ 1, n"):
        draft_chain(model, tokens, aux[1:], steps)
