"""--eagle-init-from-base: the tensors of a draft that starts as the base's last layers.

Draft layer i of N is a copy of base layer n - N + i. The first one reads [embedding ; hidden]: the
base's qkv goes to the half of the hidden state, zeros to the embedding's. fc passes the last aux
layer on, so that the copies read one of the base's residual streams; norm and head are the base's
final ones. A block draft's keys and values of the context are made of fc's output behind one norm,
which is the first copied layer's. All of it is read from the base's checkpoint: its layers may be
on other pipeline stages, or on none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import pattern_of, symbols
from megatron_eagle.checkpoint.layer_blocks import Block, blocks_of
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.config import DraftSpec, EagleConfig
from megatron_eagle.config.option import flag_name
from megatron_eagle.config.widths import layer_widths
from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.moe_args import moe_layers
from megatron_eagle.teacher.stored_names import is_numbered, stored_name

QKV = "self_attention.linear_qkv.weight"
_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
_COPIED = (
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_OF_DRAFTS: dict[str, object] = {
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "swiglu": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "rotary_interleaved": False,
    "qk_l2_norm": False,
}
"""Properties of a draft's layers, without which a copy would compute something else."""
Tensors = Mapping[str, Callable[[], Tensor]]
"""Checkpoint keys of a draft, and functions that read the whole, unsharded tensor."""


def check_base_start(options: EagleConfig, base: BaseInfo) -> None:
    """Raise ``UserError`` if the draft's layers cannot be copies of the base's last."""
    if not options.train.init_from_base:
        return
    args, flag = base.megatron_args, "--eagle-init-from-base"
    if args.get("multi_latent_attention"):
        raise UserError(f"{flag}: layers of multi-latent attention are not copied")
    if options.spec.num_layers > args["num_layers"]:
        raise UserError(
            f"{flag}: --eagle-num-layers {options.spec.num_layers}, but the base has "
            f"{args['num_layers']} layers"
        )
    if options.spec.qk_layernorm and not args.get("qk_layernorm"):
        raise UserError(
            f"{flag}: {flag_name('qk_layernorm')}, but the base does not norm queries and keys"
        )
    for name, value in _OF_DRAFTS.items():
        if args.get(name, value) != value:
            raise UserError(f"{flag}: the base has {name} = {args[name]}, a draft {value}")
    pattern, layers = pattern_of(args), options.spec.num_layers
    if pattern is not None and not symbols(pattern).endswith("*-" * layers):
        raise UserError(
            f"{flag}: the base's last layers in {pattern} are not attention with an MLP (*-), as a "
            "draft's are"
        )
    if any(moe_layers(args)[-layers:]):
        raise UserError(f"{flag}: the base's last layer has experts, a dense draft has not")
    blocks = blocks_of(args)
    alike = Block(attends=True, ffn=args.get("ffn_hidden_size"))
    if blocks is not None and any(block != alike for block in blocks[-layers:]):
        raise UserError(
            f"{flag}: the base's last layers are not attention with an MLP of ffn_hidden_size "
            f"{args['ffn_hidden_size']}, as a draft's are"
        )
    for name, width in layer_widths(options.spec, args).items():
        if width != args[name]:
            raise UserError(f"{flag}: {flag_name(name)} {width}, but the base has {args[name]}")


def left_out(base: BaseInfo, spec: DraftSpec) -> str:
    """Name the parts of the base's layers that the draft does not have; empty if there are none."""
    args = base.megatron_args
    norms = args.get("qk_layernorm") and not norms_heads(spec)
    keeps = flag_name("qk_layernorm")
    parts = {
        "biases": args.get("add_qkv_bias") or args.get("add_bias_linear"),
        f"query and key norms (queries and keys start at random; {keeps} keeps them)": norms,
    }
    return " and ".join(words for words, there in parts.items() if there)


def norms_heads(spec: DraftSpec) -> bool:
    """Return whether the draft norms its queries and keys, as block drafts always do."""
    return spec.qk_layernorm or spec.method.drafts_blocks


class BaseStart:
    """Reader of the start tensors of a draft of ``spec`` and ``vocab_ids``, from the base in
    ``directory``.

    Reading one takes the memory of that tensor, of one layer; no collective.
    """

    def __init__(self, spec: DraftSpec, base: BaseInfo, directory: str, vocab_ids: Tensor) -> None:
        self.spec, self.args, self.vocab_ids = spec, base.megatron_args, vocab_ids
        self.checkpoint = CheckpointReader.open(directory)

    def tensors(self, aux_layers: int, scale: float, init_std: float) -> Tensors:
        """Return the readers by checkpoint key; tensors without one start as a fresh draft's.

        fc multiplies the last of ``aux_layers`` aux layers by ``scale``; ``init_std`` is the spread
        of queries and keys that start at random.
        """
        tied = not self.args["untie_embeddings_and_output_weights"]
        head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
        readers: dict[str, Callable[[], Tensor]] = {
            "draft.fc.weight": partial(self._fc, aux_layers, scale),
            "draft.norm.weight": partial(self._whole, self._final_norm()),
        }
        last, blocks = self.args["num_layers"], self.spec.method.drafts_blocks
        first = last - self.spec.num_layers
        if blocks:
            readers["draft.hidden_norm.weight"] = partial(self._of_layer, first, _INPUT_NORM)
        else:
            readers["draft.lm_head.weight"] = partial(self._rows, head, self.vocab_ids.tolist())
        for index, layer in enumerate(range(first, last)):
            prefix, doubled = f"draft.layers.{index}.", index == 0 and not blocks
            norm = "input_layernorm.hidden_norm.weight" if doubled else _INPUT_NORM
            names = {name: name for name in _COPIED} | {norm: _INPUT_NORM}
            for draft_name, base_name in names.items():
                readers[prefix + draft_name] = partial(self._of_layer, layer, base_name)
            readers[prefix + QKV] = partial(self._qkv, layer, doubled, init_std)
            if norms_heads(self.spec):
                for name in _HEAD_NORMS:
                    readers[prefix + name] = partial(self._head_norm, layer, name)
        return readers

    def _final_norm(self) -> str:
        hybrid = pattern_of(self.args) is not None
        return f"decoder.final_{'norm' if hybrid else 'layernorm'}.weight"

    def _whole(self, key: str) -> Tensor:
        return self.checkpoint.load([key])[key]

    def _rows(self, key: str, rows: list[int]) -> Tensor:
        return self.checkpoint.load_rows(key, rows)

    def _of_layer(self, layer: int, name: str) -> Tensor:
        keys = self.checkpoint.keys()
        if (pattern := pattern_of(self.args)) is not None:  # which ends in pairs
            mlp = len(symbols(pattern)) - 1 - 2 * (self.args["num_layers"] - 1 - layer)
            layer = mlp if name.startswith("mlp.") else mlp - 1
        if is_numbered(keys):
            return self._whole(stored_name(f"decoder.layers.{layer}.{name}", keys))
        return self._rows(stored_name(f"decoder.layers.{name}", keys), [layer])[0]

    def _qkv(self, layer: int, first: bool, init_std: float) -> Tensor:
        weight = self._of_layer(layer, QKV)
        if self.args.get("qk_layernorm") and not norms_heads(self.spec):
            # without norms, scores would be of any size
            groups = weight.unflatten(0, (self.args["num_query_groups"], -1))
            generator = torch.Generator().manual_seed(layer)
            groups[:, : -self.args["kv_channels"]].normal_(0.0, init_std, generator=generator)
        return torch.cat([torch.zeros_like(weight), weight], dim=1) if first else weight

    def _head_norm(self, layer: int, name: str) -> Tensor:
        """Return the weight [d] of a layer's query or key norm: the base's, or where it has none,
        the size that each channel of its queries or keys has behind the input norm, if the channels
        of that are independent."""
        if self.args.get("qk_layernorm"):
            return self._of_layer(layer, name)
        weight = self._of_layer(layer, QKV) * self._of_layer(layer, _INPUT_NORM)
        heads = weight.unflatten(0, (self.args["num_query_groups"], -1, self.args["kv_channels"]))
        parts = heads[:, -2:-1] if name == _HEAD_NORMS[1] else heads[:, :-2]
        return parts.square().sum(-1).mean((0, 1)).sqrt()

    def _fc(self, aux_layers: int, scale: float) -> Tensor:
        hidden = self.args["hidden_size"]
        weight = torch.zeros(hidden, aux_layers * hidden)
        weight[:, -hidden:].fill_diagonal_(scale)
        return weight
