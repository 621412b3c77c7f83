"""Mistakes of somebody who attaches a draft, and what each says. Runs inside a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import megatron_eagle
from megatron_eagle.errors import UserError
from tests.helpers.attached_case import (
    AUX,
    LENGTH,
    VOCAB,
    AttachedCase,
    Data,
    begin,
    in_ddp,
    make_gpt,
    run_model,
)
from tests.helpers.attached_run import attach_case

SAID = {
    "pipeline": "pipeline_model_parallel_size 2: the draft reads layers of all stages",
    "virtual stages": "model: a list of 2 virtual pipeline stages",
    "another model": "model: a draft is attached to a GPTModel or HybridModel, not to a torch.nn",
    "cuda graphs": "cuda_graph_impl local of model: hooks do not run when a graph is replayed",
    "layer out of range": "aux_layers 4 is out of range: the base has layers 0 to 3",
    "no default layers": "aux_layers must be given for a base of 4 layers",
    "vocabulary": "vocab_size 65: the tokenizer's, without padding; model has 64 rows",
    "ids missing": "draft_vocab_size 23 needs vocab_ids",
    "ids of another size": "vocab_ids are 4 ids, draft_vocab_size is 23",
    "ids beyond the vocabulary": "vocab_ids: the draft vocabulary's ids reach from 0 to 63",
    "option of a run": "train_data x.jsonl: the trainer's own, no option of attach",
    "widths": "num_query_groups: 3 key/value heads do not divide the draft's 4 attention heads",
    "mla": "attention mla: a draft beside a model in memory has grouped queries",
    "half precision": "dtype torch.float16: a draft is trained in torch.float32 or torch.bfloat16",
    "shared head": "dtype torch.bfloat16: an eagle1 draft multiplies by the model's output layer",
    "other model's config": "hf_config: hidden_size is 64, model has 32",
    "other rope": "hf_config: rope_theta is 500000, model has 10000",
    "other scaling": "hf_config: model has other rotary frequencies than llama3 RoPE",
    "no forward": "the draft's loss needs a forward of the model before it",
    "paused forward": "the draft's loss needs a forward of the model before it",
    "loss twice": "the draft's loss needs a forward of the model before it",
    "two forwards": "2 forwards of the model since the draft's last loss",
    "mask of another shape": "loss_mask has shape [2, 23], the model's input_ids [2, 24]",
    "weights": "loss_mask holds weights",
    "short sequence": "sequences of 4 tokens: ttt_steps 3 needs at least 5",
    "embeddings": "decoder_input: the draft knows no embeddings but those of input_ids",
    "no sums": "sums are empty",
    "format": "format gguf: not one of hf, vllm, sglang, trtllm, speculators",
    "server": "format hf: ",
    "experts": "the draft: a MoE draft cannot be converted",
    "the model's own config": "nothing",
}
"""Mistake -> how the error begins; the last is none."""


def mistakes() -> dict[str, str]:
    """Return what each mistake says."""
    groups = begin()
    gpt = make_gpt("llama", groups)
    calls = {**_of_the_model(gpt), **_of_the_draft(gpt), **_of_the_trainer(gpt)}
    return {name: _said(call) for name, call in calls.items()}


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return "nothing"


def _attach(gpt: Any, train: Any = None, **changes: Any) -> Any:
    """Attach with every argument right but for ``changes``, of the spec or of attach."""
    spec = {"aux_layers": AUX, "draft_vocab_size": 23, "vocab_size": VOCAB}
    spec |= {"vocab_ids": torch.arange(23), **changes}
    names = [field.name for field in dataclasses.fields(megatron_eagle.DraftSpec)]
    own = {name: spec.pop(name) for name in names if name in spec}
    return megatron_eagle.attach(gpt, megatron_eagle.DraftSpec(**own), train, **spec)


def _of_the_model(gpt: Any) -> dict[str, Callable[[], Any]]:
    def with_config(**changes: Any) -> None:
        config, gpt.config = gpt.config, SimpleNamespace(**(vars(gpt.config) | changes))
        try:
            _attach(gpt)
        finally:
            gpt.config = config

    return {
        "pipeline": lambda: with_config(pipeline_model_parallel_size=2),
        "virtual stages": lambda: _attach([gpt, gpt]),
        "another model": lambda: _attach(torch.nn.Linear(2, 2)),
        "cuda graphs": lambda: with_config(cuda_graph_impl="local"),
    }


def _of_the_draft(gpt: Any) -> dict[str, Callable[[], Any]]:
    hf = {"max_position_embeddings": LENGTH, "rope_theta": 10000.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    eagle1 = {"algorithm": "eagle1", "aux_layers": None}
    whole = {"draft_vocab_size": None, "vocab_ids": None}
    options = megatron_eagle.TrainOptions
    return {
        "layer out of range": lambda: _attach(gpt, aux_layers=(1, 4)),
        "no default layers": lambda: _attach(gpt, aux_layers=None),
        "vocabulary": lambda: _attach(gpt, vocab_size=65),
        "ids missing": lambda: _attach(gpt, vocab_ids=None),
        "ids of another size": lambda: _attach(gpt, vocab_ids=torch.arange(4)),
        "ids beyond the vocabulary": lambda: _attach(gpt, vocab_ids=torch.arange(22).mul(3)),
        "option of a run": lambda: _attach(gpt, options(train_data="x.jsonl")),
        "widths": lambda: _attach(gpt, num_query_groups=3),
        "mla": lambda: _attach(gpt, attention="mla"),
        "half precision": lambda: _attach(gpt, dtype=torch.float16),
        "shared head": lambda: _attach(gpt, **eagle1, **whole, dtype=torch.bfloat16),
        "other model's config": lambda: _attach(gpt, hf_config={**hf, "hidden_size": 64}),
        "other rope": lambda: _attach(gpt, hf_config={**hf, "rope_theta": 500000.0}),
        "the model's own config": lambda: _attach(gpt, hf_config={**hf, "hidden_size": 32}),
        "other scaling": lambda: _attach(gpt, hf_config={**hf, "rope_scaling": llama3}),
    }


def _of_the_trainer(gpt: Any) -> dict[str, Callable[[], Any]]:
    attached = attach_case(AttachedCase(), gpt)
    data = Data.make(documents=False)
    part = Data(data.tokens[:2], data.loss_mask[:2], data.position_ids[:2])
    short = Data(*(x[:, :4] for x in (part.tokens, part.loss_mask, part.position_ids)))

    def after(forwards: int, mask: Any = part.loss_mask, data: Data = part) -> None:
        for _ in range(forwards):
            run_model(gpt, data)
        attached.loss(mask)

    def paused() -> None:
        with attached.paused():
            run_model(gpt, part)
        attached.loss(part.loss_mask)

    def embeddings() -> None:
        given = torch.zeros(LENGTH, 2, gpt.config.hidden_size)
        gpt(part.tokens, part.position_ids, None, decoder_input=given)
        attached.loss(part.loss_mask)

    def loss_twice() -> None:
        after(1)
        attached.loss(part.loss_mask)

    experts = _attach(gpt, num_experts=2)
    eagle1 = attach_case(AttachedCase(spec={"algorithm": "eagle1"}, draft_vocab=None), gpt)
    return {
        "no forward": lambda: attached.loss(part.loss_mask),
        "paused forward": paused,
        "loss twice": loss_twice,
        "two forwards": lambda: after(2),
        "mask of another shape": lambda: after(1, part.loss_mask[:, 1:]),
        "weights": lambda: after(1, part.loss_mask * 0.5),
        "short sequence": lambda: after(1, short.loss_mask, short),
        "embeddings": embeddings,
        "no sums": lambda: attached.finish_step(in_ddp(attached.config, attached.module), []),
        "format": lambda: next(attached.export_weights("gguf")),
        "server": lambda: next(eagle1.export_weights("hf")),
        "experts": lambda: next(experts.export_weights()),
    }
