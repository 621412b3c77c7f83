"""Base and draft of Transformer Engine's layers beside those of Megatron-Core's, in one process.

    python -m tests.helpers.te_case FAMILY:DRAFT ...

prints a JSON object per case. It has to be a process of its own: Megatron looks for Transformer
Engine when it is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.te_python import FIRST_MICROBATCH, install_te

STEPS = 3
LAYERS = 7
BLOCKS = {"mask_token": 60, "block_size": 4, "aux_layers": (1, 3)}
DRAFTS: dict[str, dict[str, Any]] = {
    "gqa": {"attention": "gqa"},
    "mla": {"attention": "mla"},
    "two-layers": {"num_layers": 2, "norm_before_fc": True, "qk_layernorm": True},
    "moe": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
    "eagle1": {"algorithm": "eagle1"},
    "eagle3.1": {"algorithm": "eagle3.1"},
    "p-eagle": {"algorithm": "p-eagle", "mask_token": 60},
    "mtp": {"algorithm": "mtp"},
    "dflash": {"algorithm": "dflash", **BLOCKS},
    "dspark": {"algorithm": "dspark", "confidence_head": True, **BLOCKS},
}


def main(cases: list[str]) -> None:
    install_te()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    import torch

    from megatron_eagle.platform import enable

    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        enable()
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.moe import moe_utils

        moe_utils.te_general_gemm = None  # a router's product, which Megatron also has in PyTorch
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        for number, case in enumerate(cases):
            family, draft = case.split(":")
            fields: dict[str, Any] = {"num_hidden_layers": LAYERS}
            if family == "deepseek_v2_lite":
                family, fields = "deepseek_v2", {**fields, "q_lora_rank": None}
            if case == "qwen3_next:mtp":  # whose module has experts as all its layers have
                fields["mlp_only_layers"] = []
            print(json.dumps(compare(Path(folder) / str(number), family, draft, fields)))
        torch.distributed.destroy_process_group()


def compare(folder: Path, family: str, draft: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Build one model of each kind of layers from one base, and compare what they are and do."""
    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.hf.base.import_base import import_base
    from tests.helpers.tiny_hf import make_base

    make_base(folder / "hf", family, **fields)
    import_base(folder / "hf", folder / "base")
    info = load_base_json(folder / "base")
    local, own, engine = (
        Built.of(folder / "base", info, DRAFTS[draft], kind) for kind in ("local", "te-own", "te")
    )
    found = {
        "routers": [sorted(model.routers()) for model in (local, engine)],
        "core_attention": [sorted(model.core_attentions()) for model in (local, engine, own)],
        "base_weights_equal": local.base_weights() == engine.base_weights(),
        "draft_keys_differ": sorted(local.keys() ^ engine.keys()),
        "te_to_local": transfer(engine, local, folder / "te"),
        "local_to_te": transfer(local, engine, folder / "local"),
        "te_to_te": transfer(engine, own, folder / "own"),
    }
    FIRST_MICROBATCH.clear()
    numbers, expected = engine.step(), local.step()
    found["calls"] = len(FIRST_MICROBATCH)
    base_linears = engine.base_linears()
    found["draft_overwrites"] = any(x is not None for x in FIRST_MICROBATCH[base_linears:])
    found["error"] = largest_difference(numbers, expected)
    found["error_with_its_attention"] = largest_difference(own.step(), expected)
    found["compared"] = len(expected)
    return found


def largest_difference(numbers: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference, as a part of the largest number of its tensor."""
    assert numbers.keys() == expected.keys()
    return max(
        float((numbers[name] - expected[name]).abs().max() / (expected[name].abs().max() + 1e-9))
        for name in expected
    )


@dataclasses.dataclass
class Built:
    """A base and a draft of one kind of layers: local, te, or te with its own core attention."""

    model: Any
    kind: str

    @classmethod
    def of(cls, directory: Path, info: Any, draft_options: dict[str, Any], kind: str) -> Built:
        import torch
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron_eagle.config import EagleConfig
        from megatron_eagle.draft.build import build_draft
        from megatron_eagle.draft.layer_config import draft_rotary
        from megatron_eagle.draft.metadata import draft_metadata, encode_metadata, resolved_spec
        from megatron_eagle.hf.draft.base_module import beside_base
        from megatron_eagle.layers.backend import local_backend, transformer_engine_backend
        from megatron_eagle.model import EagleGPTModel
        from megatron_eagle.teacher.base import FrozenBase
        from megatron_eagle.teacher.build import base_config, build_base, load_base
        from megatron_eagle.teacher.vocab_shards import VocabShards

        groups = ProcessGroupCollection.use_mpu_process_groups()
        steps = {} if "block_size" in draft_options else {"ttt_steps": STEPS}
        options = EagleConfig.of(base_checkpoint=str(directory), **draft_options, **steps)
        spec = beside_base(options.spec, info.megatron_args)
        options = dataclasses.replace(options, spec=spec)
        aux_layers = options.spec.aux_layers_of(LAYERS)
        config = base_config(info, 1, use_cpu_initialization=True)
        config.perform_initialization = False
        config.calculate_per_token_loss = True
        on_gpu = mock.patch("torch.cuda.is_available", lambda: True)
        backend = local_backend()
        if kind != "local":
            config.transformer_impl = "transformer_engine"
            backend = transformer_engine_backend(keeps_states=kind == "te")
        with contextlib.nullcontext() if kind == "local" else on_gpu:
            gpt = build_base(config, info, backend, groups)
            shards = VocabShards(gpt)
            load_base(gpt, directory, shards)
            base = FrozenBase(gpt, aux_layers, info.vocab_size, shards)
            every = 1 if options.spec.method.shares_base_head else 2
            vocab_ids = torch.arange(0, info.vocab_size, every)
            spec = resolved_spec(options.spec, info, aux_layers, vocab_ids.numel())
            metadata = draft_metadata(spec, info, ttt_steps=options.steps, training={})
            torch.manual_seed(3)
            draft = build_draft(
                spec=spec,
                num_aux=len(aux_layers),
                base_config=config,
                backend=backend,
                vocab_ids=vocab_ids,
                vocab_size=info.vocab_size,
                base_head=lambda: base.output_weight,
                base_head_rows=base.output_weight.shape[0],
                rotary=draft_rotary(base.rotary, info, spec, torch.device("cpu")),
                metadata=encode_metadata(metadata),
                pg_collection=groups,
                device=torch.device("cpu"),
                moe_aux_loss_coeff=options.moe_aux_loss_coeff,
            )
        with torch.no_grad():
            for parameter in draft.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.rand_like(parameter))  # norms at 1 would hide a swap
        return cls(EagleGPTModel(base, draft, options), kind)

    def routers(self) -> set[str]:
        from megatron_eagle.compat import TopKRouter

        return {type(m).__name__ for m in self.model.base.modules() if isinstance(m, TopKRouter)}

    def core_attentions(self) -> set[str]:
        layers = self.model.base.gpt.decoder.layers
        mixers = [getattr(layer, "self_attention", None) for layer in layers]
        found = [getattr(mixer, "core_attention", None) for mixer in mixers]
        return {type(attention).__name__ for attention in found if attention is not None}

    def base_weights(self) -> list[int]:
        """The base's weights whatever their names, as hashes."""
        weights = self.model.base.gpt.state_dict().items()
        return sorted(
            hash(value.float().numpy().tobytes())
            for name, value in weights
            if hasattr(value, "float") and not name.endswith("_extra_state")
        )

    def base_linears(self) -> int:
        """How many linear layers of Transformer Engine one pass of the base calls at least."""
        return 0 if self.kind == "local" else self._base_calls

    def keys(self) -> set[str]:
        """The keys of the draft's checkpoint."""
        from megatron_eagle.compat import apply_factories, nested_values

        sharded = self.model.sharded_state_dict()
        apply_factories(sharded)
        return {value.key for value in nested_values(sharded)}

    def step(self) -> dict[str, Any]:
        """Loss, metrics and the gradient of every parameter, by its key in a checkpoint."""
        import torch

        from megatron_eagle.compat import nested_values

        batch = self._batch()
        outputs = self.model.base(batch.tokens, batch.packing)
        self._base_calls = len(FIRST_MICROBATCH)
        loss, sums = self.model(batch, outputs)
        loss.backward()
        found = {"loss": loss.detach(), "sums": sums.detach()}
        parameters = {p.data_ptr(): p for p in self.model.draft.parameters()}
        for value in nested_values(self.model.draft.sharded_state_dict("draft.")):
            data = getattr(value, "data", None)
            if isinstance(data, torch.Tensor) and data.data_ptr() in parameters:
                found[value.key] = parameters[data.data_ptr()].grad
        self.model.zero_grad()
        return {key: value for key, value in found.items() if value is not None}

    def _batch(self) -> Any:
        import torch

        from megatron_eagle.objective.batch import EagleBatch
        from megatron_eagle.objective.block_batch import BlockBatch, BlockShape

        spec, options = self.model.options.spec, self.model.options
        generator = torch.Generator().manual_seed(5)
        tokens, mask = torch.randint(60, (2, 16), generator=generator), torch.ones(2, 16)
        if not spec.method.drafts_blocks:
            every_row = spec.num_experts is not None
            return EagleBatch.build(tokens, mask, STEPS, every_row=every_row)
        shape = BlockShape(spec.slots, 0 if spec.method.slot_zero_predicts else 1)
        anchors = options.blocks().anchors
        return BlockBatch.build(tokens, mask, range(2), shape, anchors=anchors, seed=11)


def transfer(source: Built, target: Built, path: Path) -> str:
    """Save a draft and load it into another, strictly; "loads", or why not."""
    from megatron_eagle.compat import dist_checkpointing

    path.mkdir()
    saved = {"checkpoint_version": 3.0, **source.model.sharded_state_dict()}
    dist_checkpointing.save(saved, str(path))
    try:
        state = dist_checkpointing.load(target.model.sharded_state_dict(), str(path))
        target.model.load_state_dict(
            {key: value for key, value in state.items() if key.startswith("draft.")}, strict=True
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(getattr(error, 'failures', error))[:300]}"
    return "loads"


if __name__ == "__main__":
    main(sys.argv[1:])
