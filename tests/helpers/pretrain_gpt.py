"""Train a GPT with Megatron's own trainer on random tokens, as its pretrain_gpt.py does, or a
HybridModel, as its pretrain_hybrid.py does.

``--reference FILE``: write this rank's part of what the trained model computes to FILE.RANK.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from megatron_eagle.platform import enable

enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.models import GPTModelBuilder, HybridModelBuilder  # noqa: E402

built: list[Any] = []


class OnePlusNorm(torch.nn.LayerNorm):
    """What Transformer Engine computes with --apply-layernorm-1p; Megatron has no such module."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)
        return centered * scale * (1 + self.weight) + self.bias


class PlainAttention(torch.nn.Module):
    """Causal attention whose values may be narrower than its keys, which Megatron's own lacks."""

    def __init__(self, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Any, k: Any, v: Any, _mask: Any, **_kwargs: Any) -> torch.Tensor:
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) * self.scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)


def provide_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    args = get_args()
    if args.hybrid_layer_pattern is None:
        model_config = gpt_config_from_args(args, config)
        builder: Any = GPTModelBuilder(model_config)
    else:
        from tests.helpers.hybrid_stack import hybrid_stack

        model_config = hybrid_config_from_args(args, config)
        model_config.transformer.deterministic_mode = True  # gated delta nets in plain PyTorch
        model_config.hybrid_stack_spec = hybrid_stack(args.num_experts)
        builder = HybridModelBuilder(model_config)
    model = builder.build_model(pg_collection, pre_process, post_process)
    built.append(model)
    return model


class RandomTokens(torch.utils.data.Dataset):
    def __init__(self, length: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(vocab, (64, length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def provide_data(_sizes: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
    args = get_args()
    return RandomTokens(args.seq_length, args.vocab_size), None, None


provide_data.is_distributed = True  # type: ignore[attr-defined]


def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach()}


def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    rows = next(iterator)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), partial(loss_of)


@torch.no_grad()
def reference(model: Any, vocab: int) -> dict[str, Any]:
    """This stage's layers' outputs, and the logits on the last stage."""
    model.eval()
    layers: dict[int, torch.Tensor] = {}

    def keep(index: int, _module: Any, _inputs: Any, output: Any) -> None:
        layers[index] = (output[0] if isinstance(output, tuple) else output).clone()

    for layer in model.decoder.layers:
        layer.register_forward_hook(partial(keep, layer.layer_number - 1))
    tokens = torch.randint(vocab, (2, 24), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(24).expand_as(tokens)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    if rank > 0:
        hidden = torch.empty(24, 2, model.config.hidden_size)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(tokens, positions, None)
    found = {"tokens": tokens, "layers": layers}
    if not model.post_process:
        following = parallel_state.get_pipeline_model_parallel_next_rank()
        torch.distributed.send(output.contiguous(), following)
        return found
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(output) for _ in range(group.size())]
    torch.distributed.all_gather(parts, output.contiguous(), group=group)
    return {**found, "logits": torch.cat(parts, -1)[..., :vocab]}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--reference")
    own, words = parser.parse_known_args()
    sys.argv[1:] = words
    if "--apply-layernorm-1p" in words:
        from megatron.core.models import backends
        from megatron.core.models.gpt import gpt_layer_specs
        from megatron.core.transformer import transformer_block

        for module in (backends, gpt_layer_specs, transformer_block):
            module.LNImpl = OnePlusNorm  # type: ignore[attr-defined]
            module.LayerNormImpl = OnePlusNorm  # type: ignore[attr-defined]
    if "--multi-latent-attention" in words:
        from megatron.core.models.backends import LocalSpecProvider

        LocalSpecProvider.core_attention = lambda self: PlainAttention  # type: ignore
    args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args),
        provide_data,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=provide_model,
    )
    if own.reference:
        rank = torch.distributed.get_rank()
        torch.save(reference(built[0], args.vocab_size), f"{own.reference}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
