"""Data for the trainer: Megatron's own builders, or documents with masks.

Every tensor-parallel rank reads its samples itself, so nothing is broadcast and the number of
supervised rows is known on the host without a synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.data.documents import DocumentDataset, FittedDocuments, training_documents
from megatron_eagle.data.indexed import MASK_SUFFIX, dataset_exists
from megatron_eagle.data.protected import config_token_ids, special_and_byte_ids
from megatron_eagle.errors import UserError
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.teacher.base import BaseOutputs
from megatron_eagle.training.agreement import (
    check_agreement,
    digest_data_sets,
    digest_tensor,
)
from megatron_eagle.training.data_record import (
    document_record,
    indexed_record,
    note_training_data,
)
from megatron_eagle.training.numbered import NumberedSamples
from megatron_eagle.training.token_counts import TrainingBlend, count_tokens


class DatasetProvider:
    """A Megatron ``train_valid_test_dataset_provider``."""

    is_distributed = True

    def __init__(self, options: EagleConfig, base: BaseInfo, vocab_ids: Tensor) -> None:
        self.options, self.base, self.vocab_ids = options, base, vocab_ids

    def __call__(self, num_samples: Sequence[int], vp_stage: int | None = None) -> tuple:
        args, (train, valid, test) = get_args(), self._datasets(num_samples)
        if args.iteration >= args.train_iters:  # Megatron's sampler takes no samples for a mistake
            print_rank_0(
                f"> nothing left to train: the checkpoint is at iteration {args.iteration} of "
                f"--train-iters {args.train_iters}"
            )
            train = None
        if self.options.spec.method.drafts_blocks:
            train, valid, test = map(NumberedSamples.of, (train, valid, test))
        return train, valid, test

    def _datasets(self, num_samples: Sequence[int]) -> tuple:
        args = get_args()
        if self.options.train.reads_documents:
            documents = training_documents(self.options, self.base)
            fitted = FittedDocuments(documents, args.seq_length)
            source = "train_data" if self.options.train.train_data else "offline_features"
            record = document_record(fitted)
            self._check_agreement(f"<{source}>", record["sha256"])
            _tell_what_is_cut(fitted, len(documents.lengths))
            note_training_data(args, record)
            train = DocumentDataset(fitted, num_samples[0], args.seed, self.options.train.pack)
            if self.options.train.pack:
                filled = fitted.lengths.sum() / (train.samples_per_epoch * args.seq_length)
                print_rank_0(
                    f"> {len(fitted):,} documents packed into {train.samples_per_epoch:,} "
                    f"sequences, {filled:.1%} full"
                )
            return train, None, None
        _refuse_masks_that_would_be_ignored(args)
        prefixes = [] if args.mock_data else TrainingBlend.of(args).prefixes
        self._check_agreement("--data-path", digest_data_sets(prefixes))
        if not args.mock_data:
            note_training_data(args, indexed_record(prefixes))
        kind = MockGPTDataset if args.mock_data else GPTDataset
        config = gpt_dataset_config(args)
        return tuple(BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build())

    def _check_agreement(self, source: str, digest: str) -> None:
        """Check that all ranks have the same base, draft vocabulary and data. A collective."""
        check_agreement(
            {
                "<base_checkpoint>": self.base.fingerprint,
                "the draft's vocabulary": digest_tensor(self.vocab_ids),
                source: digest,
            }
        )


def _tell_what_is_cut(fitted: FittedDocuments, documents: int) -> None:
    if fitted.tokens_cut:
        print_rank_0(
            f"> --seq-length {fitted.seq_length} cuts {fitted.tokens_cut:,} tokens off longer "
            f"documents; {fitted.left_out:,} of {documents:,} documents have nothing supervised "
            "before the cut and are left out"
        )


def _refuse_masks_that_would_be_ignored(args: Any) -> None:
    prefixes = [] if args.mock_data else TrainingBlend.of(args).prefixes
    for prefix in prefixes:
        if dataset_exists(prefix + MASK_SUFFIX):
            raise UserError(
                f"--data-path {prefix}: supervises every token, but {prefix}{MASK_SUFFIX} says "
                f"which; use --eagle-train-data {prefix}"
            )


def gpt_dataset_config(args: Any) -> GPTDatasetConfig:
    """Return the configuration of Megatron's dataset builder for ``.bin/.idx`` data."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        mmap_bin_files=args.mmap_bin_files,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )


def next_batch(iterator: Any, steps: int, vocab_size: int, every_row: bool = False) -> EagleBatch:
    """Take the iterator's next micro-batch, on the host; raise as :func:`next_sample`.
    ``every_row`` as in ``EagleBatch.build``."""
    sample, tokens, multiple, context = next_sample(iterator, vocab_size)
    args = get_args()
    batch = EagleBatch.build(
        tokens,
        sample["loss_mask"],
        steps,
        multiple=multiple,
        parts=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        every_row=every_row,
        trim=True,
        context=context,
        positions=sample["positions"] if args.eagle_pack else None,
    )
    if "aux_hidden" not in sample:
        return batch
    return replace(batch, base_outputs=stored_outputs(sample, batch.tokens.shape[1]))


def next_sample(iterator: Any, vocab_size: int) -> tuple[Any, Tensor, int, tuple[int, int]]:
    """Take the iterator's next micro-batch as its data set gives it: all of it, its tokens [B, S],
    what a length must be a multiple of, and rank and size of the context-parallel group.

    Raises ``UserError`` for ids that the base does not have: a vocabulary-parallel embedding would
    look them up in another rank's rows without a word.
    """
    args = get_args()
    sample = next(iterator)
    tokens = sample["tokens"].long()
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= vocab_size:
        raise UserError(
            f"--data-path: token id {least if least < 0 else most} is outside the base's "
            f"0 to {vocab_size - 1}; was the data made with another tokenizer?"
        )
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context = (mpu.get_context_parallel_rank(), args.context_parallel_size)
    if args.context_parallel_size > 1:
        multiple *= 2 * args.context_parallel_size
    return sample, tokens, multiple, context


def stored_outputs(sample: Any, length: int) -> BaseOutputs:
    """Return this rank's part of a micro-batch's stored hidden states, cut at ``length``."""
    args = get_args()
    shard = ContextShard(length, mpu.get_context_parallel_rank(), args.context_parallel_size)
    outputs = [_local_rows(sample[name], shard, args) for name in ("aux_hidden", "final_hidden")]
    return BaseOutputs(*outputs)


def _local_rows(hidden: Tensor, shard: ContextShard, args: Any) -> Tensor:
    """Cut this rank's rows [S', B, W] out of ``hidden`` [B, S, W], in the dtype of the model."""
    rows = shard.take(hidden[:, : shard.length].transpose(0, 1), 0)
    if args.sequence_parallel:
        ranks = args.tensor_model_parallel_size
        rows = rows.chunk(ranks)[mpu.get_tensor_model_parallel_rank()]
    return rows.to(args.params_dtype).contiguous()


def count_supervised(args: Any, options: EagleConfig, base: BaseInfo) -> Tensor:
    """Count how often training supervises each id, [V] int64: in the documents, or in a sample of
    the tokens of ``--data-path`` (proportions)."""
    vocab_size = base.vocab_size
    if options.train.reads_documents:
        return training_documents(options, base).counts(vocab_size)
    if args.mock_data:
        return torch.ones(vocab_size, dtype=torch.int64)
    return count_tokens(TrainingBlend.of(args), vocab_size)


def protected_ids(vocab_size: int, hf_config: dict[str, Any]) -> set[int]:
    """Return the ids that the draft vocabulary keeps whatever the counts say: the special and byte
    tokens of the tokenizer in use, and the base's own bos, eos and pad."""
    from_tokenizer = special_and_byte_ids(get_tokenizer())
    if not from_tokenizer:
        print_rank_0(
            "> no tokenizer given: of special and byte tokens, the draft vocabulary is sure to "
            "hold only the base's bos, eos and pad (see --tokenizer-type, --tokenizer-model)"
        )
    protected = from_tokenizer | config_token_ids(hf_config)
    return {i for i in protected if 0 <= i < vocab_size}
