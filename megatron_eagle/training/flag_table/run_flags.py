"""Flags of a run: batches, optimizer, learning rate, data, validation, logging."""

from __future__ import annotations

from megatron_eagle.training.flag_table.judgement import honoured, no_effect, refused

JUDGEMENTS = (
    honoured(
        "batches and the length of a run",
        """--micro-batch-size --global-batch-size --rampup-batch-size --step-batch-size-schedule
        --decrease-batch-size-if-needed --seq-length --encoder-seq-length --train-iters
        --train-samples --iterations-to-skip --phase-transition-iterations --skip-train""",
    ),
    honoured(
        "the end of a run",
        """--exit-interval --exit-duration-in-mins --exit-signal-handler --exit-signal
        --exit-signal-handler-for-dataloader --exit-signal-handler-for-training""",
    ),
    honoured("the loss is normalised by tokens, always", "--calculate-per-token-loss"),
    honoured(
        "optimizer",
        """--optimizer --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum --clip-grad
        --weight-decay --start-weight-decay --end-weight-decay --weight-decay-incr-style
        --apply-wd-to-qk-layernorm --no-weight-decay-cond-type --dump-param-to-param-group-map""",
    ),
    honoured(
        "optimizers of the package emerging-optimizers (not tried)",
        """--muon-momentum --muon-no-split-qkv --muon-nesterov --muon-scale-mode
        --muon-fp32-matmul-prec --muon-coefficient-type --muon-num-ns-steps --muon-tp-mode
        --muon-extra-scale-factor --muon-scalar-optimizer --lion-beta1 --lion-beta2""",
    ),
    honoured(
        "optimizer states in other precisions or on the host, with Transformer Engine (not tried)",
        """--use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype
        --exp-avg-sq-dtype --optimizer-cpu-offload --optimizer-offload-fraction
        --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d
        --no-pin-cpu-grads --no-pin-cpu-params""",
    ),
    honoured(
        "learning rate; the decoupled one is of the draft's head",
        """--lr --min-lr --decoupled-lr --decoupled-min-lr --lr-decay-style --lr-decay-iters
        --lr-decay-samples --lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples
        --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples --lr-warmup-init
        --override-opt_param-scheduler --use-checkpoint-opt_param-scheduler""",
    ),
    honoured(
        "the draft's random start",
        """--seed --init-method-std --init-method-xavier-uniform --data-parallel-random-init
        --no-initialization --use-cpu-initialization --te-rng-tracker --deterministic-mode""",
    ),
    no_effect("a draft has no embedding of its own", "--embedding-init-method-std"),
    refused("trains nothing: the base is frozen and the draft is trained", "--freeze-all-layers"),
    honoured(
        "checks of results; a loss that is not a number is found in its gradients",
        """--no-check-for-nan-in-loss-and-grad --check-for-large-grads --check-for-spiky-loss
        --rerun-mode --error-injection-rate --error-injection-type
        --result-rejected-tracker-filename --check-weight-hash-across-dp-replicas-interval
        --gpu-sniff-test-interval""",
    ),
    honoured(
        "Megatron's own data sets",
        """--data-path --split --train-data-path --valid-data-path --test-data-path
        --data-args-path --per-split-data-args-path --data-cache-path --no-mmap-bin-files
        --mock-data --eod-mask-loss --num-dataset-builder-threads --mid-level-dataset-surplus""",
    ),
    honoured("loading", "--num-workers"),
    refused(
        "is not supported: samples are read from a data set, by its index",
        "--dataloader-type",
        unless=("single", "cyclic"),
    ),
    no_effect(
        "there is no attention mask to create",
        "--no-create-attention-mask-in-dataloader",
    ),
    refused(
        "is not supported; --eagle-pack keeps the documents of --eagle-train-data apart",
        "--reset-position-ids --reset-attention-mask --dataloader-inter-document-masking",
    ),
    refused(
        "is not read by this trainer's data sets",
        """--per-dataset-sequences-path --dataloader-fast-cache-load
        --dataloader-defer-npy-index-mmap --object-storage-cache-path
        --allow-ambiguous-pad-tokens --enable-msc --disable-msc""",
    ),
    refused(
        "is no supervision of a draft; megatron-eagle prepare-data makes chats into a data set",
        "--sft --sft-tokenizer-prompt-format",
    ),
    refused(
        "is fill-in-the-middle data, which is not supported",
        """--fim-data --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate
        --fim-no-prefix --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token
        --fim-eod-token""",
    ),
    honoured(
        "tokenizer, for special tokens and text prompts",
        """--tokenizer-type --tokenizer-model --vocab-file --merge-file --vocab-extra-ids
        --tokenizer-metadata --tokenizer-special-tokens --tiktoken-pattern
        --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy
        --no-tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast
        --tokenizer-hf-no-include-special-tokens --null-tokenizer-eod-id
        --null-tokenizer-pad-id""",
    ),
    refused("would run Python code beside a tokenizer", "--trust-remote-code"),
    no_effect("templates are rendered by megatron-eagle prepare-data", "--chat-template"),
    honoured(
        "validation of --data-path; documents have none, and the run says so",
        """--eval-iters --eval-interval --start-eval-at-iter --eval-global-batch-size
        --eval-micro-batch-size""",
    ),
    refused(
        "is not supported: this trainer's data sets have one validation split",
        "--full-validation --multiple-validation-sets --validation-set-names --test-mode",
    ),
    honoured(
        "log line, TensorBoard, Weights & Biases",
        """--log-interval --log-params-norm --log-num-zeros-in-grad --log-progress
        --timing-log-level --timing-log-option --no-barrier-with-level-1-timing --tensorboard-dir
        --tensorboard-log-interval --tensorboard-queue-size --log-timers-to-tensorboard
        --no-log-loss-scale-to-tensorboard --log-memory-to-tensorboard --log-memory-interval
        --log-device-memory-used --log-world-size-to-tensorboard --wandb-project
        --wandb-exp-name --wandb-save-dir --wandb-entity --logging-level --log-energy
        --config-logger-dir""",
    ),
    honoured(
        "counts what is done: the base's forward, K passes of the draft, teacher and head",
        "--log-throughput",
    ),
    refused(
        "is no measure of a draft: its loss is not a language model's",
        "--log-validation-ppl-to-tensorboard",
    ),
    refused(
        "traces the routers of a model that is trained, and the base is frozen",
        """--moe-routing-trace-path --moe-routing-trace-max-training-iters
        --moe-routing-trace-capture-logits --moe-routing-trace-capture-hidden-states
        --moe-routing-trace-dump-weights --moe-enable-routing-replay""",
    ),
    honoured(
        "profiling",
        """--profile --profile-step-start --profile-step-end --use-pytorch-profiler
        --pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack
        --pytorch-profiler-collect-chakra --profile-ranks --record-memory-history
        --memory-snapshot-path --record-shapes --nvtx-ranges""",
    ),
    honoured(
        "Python and memory",
        """--manual-gc --manual-gc-interval --no-manual-gc-eval --empty-unused-memory-level
        --train-sync-interval""",
    ),
    refused(
        "is no longer valid in Megatron",
        "--batch-size --warmup --model-parallel-size --checkpoint-activations",
    ),
    no_effect("there are no other models in Megatron any more", "--use-mcore-models"),
)
