"""Flags of other uses of Megatron: inference, reinforcement learning, other models."""

from __future__ import annotations

from megatron_eagle.training.flag_table.judgement import refused

JUDGEMENTS = (
    refused(
        "belongs to reinforcement learning, which this is not",
        """--perform-rl-step --rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size
        --rl-generation-lag --rl-submission-granularity --rl-consumption-granularity
        --grpo-iterations --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta
        --grpo-entropy-term-weight --grpo-filter-groups-with-same-reward --langrl-env-config
        --rl-default-temperature --rl-default-top-p --rl-default-top-k
        --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode
        --rl-persist-cuda-graphs --rl-partial-rollouts --rl-inference-logprobs-is-correction
        --rl-importance-sampling-truncation-coef --rl-use-sequence-packing
        --rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo
        --rl-training-cuda-graphs --rl-inference-tensor-model-parallel-size
        --rl-inference-pipeline-model-parallel-size --rl-inference-expert-model-parallel-size
        --rl-inference-expert-tensor-model-parallel-size
        --rl-inference-model-unified-memory-level --rl-offload-inference-model-weights-when-idle
        --refit-method --rl-verify-model-weights-swap --rl-skip-bos-token --rl-profile
        --rl-profile-dir --rl-inference-parsers""",
    ),
    refused(
        "belongs to Megatron's inference, which training does not use",
        """--inference-batch-times-seqlen-threshold --max-tokens-to-oom --flash-decode
        --use-legacy-static-engine --inference-max-requests --inference-max-seq-length
        --inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb
        --inference-dynamic-batching-paused-buffer-size-gb
        --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-block-size
        --inference-dynamic-batching-max-requests --inference-dynamic-batching-max-tokens
        --inference-dynamic-batching-num-cuda-graphs
        --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens
        --inference-dynamic-batching-unified-memory-level --enable-chunked-prefill
        --num-speculative-tokens --inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-eviction-policy
        --inference-dynamic-batching-prefix-caching-coordinator-policy
        --inference-dynamic-batching-prefix-caching-routing-alpha
        --inference-dynamic-batching-prefix-caching-mamba-gb
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count
        --inference-dynamic-batching-cuda-graph-sizing-distribution
        --inference-dynamic-batching-sampling-backend --use-same-sampling-seed-across-dp-ranks
        --inference-dynamic-batching-async-sched-mode
        --inference-dynamic-batching-logprobs-mode --inference-logging-step-interval
        --inference-text-gen-server-logging --inference-wandb-logging
        --inference-coordinator-port --mamba-inference-conv-states-dtype
        --mamba-inference-ssm-states-dtype --inference-use-synchronous-zmq-collectives
        --inference-disable-ep-consensus --inference-shards --inference-rng-tracker
        --inference-fuse-tp-communication --inference-disable-triton-nvls-kernels
        --inference-grouped-gemm-backend --inference-moe-disable-fused-quant-kernels
        --inference-moe-token-dispatcher-type --mlp-chunks-for-prefill --symmetric-ar-type
        --nccl-all-reduce-for-prefill --moe-pad-experts-for-cuda-graph-inference""",
    ),
    refused(
        "belongs to distillation from stored logits; --eagle-offline-features trains from stored "
        "hidden states",
        """--logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir
        --logits-save-dtype --logits-load-dir --logits-load-decode-threads
        --logits-load-prefetch-factor --logits-load-msc-prefetch-depth
        --logits-load-kd-loss-alpha --logits-load-ignore-errors""",
    ),
    refused(
        "belongs to BERT, T5 and retrieval models",
        """--output-bert-embeddings --bert-embedder-type --decoder-seq-length --sample-rate
        --mask-prob --short-seq-prob --ict-head-size --biencoder-projection-dim
        --biencoder-shared-query-context-model --ict-load --bert-load --titles-data-path
        --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path
        --embedding-path --indexer-batch-size --indexer-log-interval""",
    ),
    refused(
        "belongs to vision models",
        """--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction
        --data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining
        --vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type
        --mask-factor --iter-per-epoch --dino-local-img-size --dino-local-crops-number
        --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp
        --dino-warmup-teacher-temp-epochs""",
    ),
)
