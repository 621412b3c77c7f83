"""Train a small GPT with a draft attached, and without, inside a rank of ``run_distributed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.attached_case import (
    AUX,
    LENGTH,
    SEQUENCES,
    VOCAB,
    AttachedCase,
    Data,
    begin,
    in_ddp,
    make_gpt,
    micro_batches,
    oracle_inputs,
    run_model,
)


def attach_case(case: AttachedCase, gpt: Any, **options: Any) -> Any:
    import megatron_eagle

    ids = case.vocab_ids()
    eagle1 = case.spec.get("algorithm") == "eagle1"
    spec = megatron_eagle.DraftSpec(
        aux_layers=None if eagle1 else AUX, draft_vocab_size=case.draft_vocab, **case.spec
    )
    train = megatron_eagle.TrainOptions(**case.train)
    return megatron_eagle.attach(gpt, spec, train, vocab_size=VOCAB, vocab_ids=ids, **options)


def train_step(attached: Any, draft: Any, model: Any, data: Data, groups: Any) -> dict[str, Any]:
    """One step of base and draft: the draft's backward first in one micro-batch, both as one sum in
    the next. Returns the sums over all ranks, the metrics and the base's own losses."""
    sums, losses = [], []
    for index, part in enumerate(micro_batches(data, groups)):
        loss = run_model(model, part)
        draft_loss, draft_sums = attached.loss(part.loss_mask)
        assert not draft_sums.requires_grad
        if index % 2:
            (loss + draft_loss).backward()
        else:
            draft_loss.backward()
            loss.backward()
        sums.append(draft_sums)
        losses.append(loss.detach())
    metrics = attached.finish_step(draft, sums)
    total = torch.stack(sums).sum(0)
    torch.distributed.all_reduce(total, group=groups.dp_cp)
    return {"sums": total, "metrics": metrics, "losses": losses}


def exported_gradients(attached: Any, fmt: str) -> dict[str, Tensor]:
    """The draft's gradients under Hugging Face names: exported in the weights' place."""
    parameters = list(attached.module.parameters())
    weights = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        grads = dict(attached.export_weights(fmt))
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return {name: grad for name, grad in grads.items() if name not in ("d2t", "t2d", "fc.bias")}


def run_attached(rank: int, world: int, case: AttachedCase, folder: str) -> dict[str, Any]:
    """Run the model alone on one rank for the oracle, then with the draft in the case's layout."""
    from megatron.core import dist_checkpointing

    data = Data.make(case.documents)
    groups = begin()
    gpt = make_gpt(case.base, groups)
    inputs = oracle_inputs(gpt, data)
    saved = str(Path(folder) / f"{case.base}")
    if not Path(saved).exists():
        torch.distributed.barrier()
        if rank == 0:
            Path(saved).mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(gpt.sharded_state_dict(), saved)
    groups = begin(case.tp, case.cp, case.ep)
    gpt = make_gpt(case.base, groups, case.sequence_parallel)
    gpt.load_state_dict(dist_checkpointing.load(gpt.sharded_state_dict(), saved), strict=False)
    model = in_ddp(gpt.config, gpt)
    attached = attach_case(case, model)
    draft = in_ddp(attached.config, attached.module)
    result = train_step(attached, draft, model, data, groups)
    return {
        **result,
        "inputs": inputs,
        "weights": dict(attached.export_weights(case.fmt)),
        "grads": exported_gradients(attached, case.fmt),
        "names": [name for name, _ in attached.module.named_parameters()],
    }


def make_optimizer(model: Any, clip: float = 0.05) -> Any:
    """Megatron's Adam, with a clipping that bites."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=clip, weight_decay=0.0)
    return get_megatron_optimizer(config, [model])


def trained_base(kind: str, groups: Any, draft: bool, **changes: Any) -> dict[str, Any]:
    """Two optimizer steps of a base, with a draft beside it or without: everything that is the
    base's own, to the bit."""
    from megatron.core.distributed import finalize_model_grads

    torch.manual_seed(5)
    gpt = make_gpt(kind, groups, **changes)
    model = in_ddp(gpt.config, gpt)
    optimizer = make_optimizer(model)
    case = AttachedCase(base=kind)
    data = Data.make(documents=False)
    beside: dict[str, Any] = {}
    if draft:
        attached = attach_case(case, gpt)
        module = in_ddp(attached.config, attached.module)
        beside = {"attached": attached, "draft": module, "optimizer": make_optimizer(module)}
    result: dict[str, Any] = {"losses": [], "grads": [], "norms": [], "draft_norms": []}
    for _ in range(2):
        optimizer.zero_grad()
        model.zero_grad_buffer()
        if draft:
            beside["optimizer"].zero_grad()
            beside["draft"].zero_grad_buffer()
            step = train_step(beside["attached"], beside["draft"], model, data, groups)
            losses = step["losses"]
        else:
            losses = [run_model(model, part) for part in micro_batches(data, groups)]
            for loss in losses:
                loss.backward()
        finalize_model_grads([model], torch.tensor(SEQUENCES * LENGTH))
        result["losses"] += [float(loss) for loss in losses]
        result["grads"] += [p.main_grad.clone() for p in model.parameters()]
        result["norms"].append(optimizer.step()[1])
        if draft:
            grads = exported_gradients(beside["attached"], "hf").values()
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            result["draft_norms"].append((float(norm), beside["optimizer"].step()[1]))
    result["weights"] = [p.detach().clone() for p in model.parameters()]
    result["random"] = torch.get_rng_state()
    return {**result, **({"beside": beside} if draft else {})}
