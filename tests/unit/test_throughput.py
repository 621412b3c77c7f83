"""The operations that ``--log-throughput`` counts, against a count by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_eagle.training.throughput import Cost


def _layers(count: int, hidden: int) -> torch.nn.Module:
    block = torch.nn.Module()
    block.layers = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.RMSNorm(hidden), torch.nn.Linear(hidden, hidden, bias=False))
        for _ in range(count)
    )
    return block


def test_the_base_runs_forward_and_the_draft_k_passes_with_backward() -> None:
    config = SimpleNamespace(
        num_moe_experts=None, multi_latent_attention=False, num_attention_heads=4,
        tensor_model_parallel_size=2, kv_channels=8,
    )  # fmt: skip
    hidden, steps, vocab, draft_vocab = 16, 3, 100, 40
    head = torch.nn.Parameter(torch.zeros(draft_vocab, hidden))
    draft = SimpleNamespace(
        layers=_layers(1, hidden).layers,
        narrowing=SimpleNamespace(trunk_weights=lambda: 50),
        config=config,
        fc=torch.nn.Linear(3 * hidden, hidden, bias=False),
        algorithm=SimpleNamespace(joins_by_fc=False),
        lm_head=lambda: head,
    )
    base = SimpleNamespace(
        gpt=SimpleNamespace(decoder=_layers(5, hidden)),
        config=config,
        output_weight=torch.zeros(vocab, hidden),
    )
    model = SimpleNamespace(
        base=base,
        draft=draft,
        exchange=SimpleNamespace(stages=1),
        options=SimpleNamespace(train=SimpleNamespace(ttt_steps=steps)),
    )
    cost = Cost.of(model)  # type: ignore[arg-type]
    square = hidden * hidden
    assert cost.token == 2 * 5 * square + 6 * (3 * square + 50)
    assert cost.live == 6 * (square - 50 + (steps - 1) * square)
    assert cost.pair == (2 * 5 + 6) * 2 * (2 * 8)
    assert cost.target == 2 * vocab * hidden
    assert cost.judged == 6 * draft_vocab * hidden
