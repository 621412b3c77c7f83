"""Flags of processes and files: layouts, data parallelism, checkpoints, resilience."""

from __future__ import annotations

from megatron_eagle.training.flag_table.judgement import honoured, no_effect, refused

_FSDP = "is not supported yet: a draft is small enough for DDP and the distributed optimizer"
_DUMPS = "is not supported: it dumps tensors of a model that is trained as a whole"

JUDGEMENTS = (
    honoured(
        "layout",
        """--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size
        --expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
        --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
        --pipeline-model-parallel-layout --use-tp-pp-dp-mapping""",
    ),
    refused(
        "is not supported: the base only runs forward, so its pipeline has no bubbles that virtual "
        "stages could fill; leave the flag out, checkpoints load without it",
        """--num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank
        --microbatch-group-size-per-virtual-pipeline-stage
        --overlap-p2p-communication-warmup-flush --overlap-param-gather-with-optimizer-step""",
    ),
    no_effect(
        "stages exchange hidden states in the background anyway",
        "--no-overlap-p2p-communication --no-align-param-gather",
    ),
    refused(
        "is not supported; use --decoder-first-pipeline-num-layers and "
        "--decoder-last-pipeline-num-layers",
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    refused(
        "is not supported: stages have links of their own",
        "--pipeline-model-parallel-comm-backend --use-ring-exchange-p2p",
    ),
    refused(
        "is not supported: a draft's keys and values are gathered",
        "--cp-comm-type",
        unless=(["p2p"],),
    ),
    refused(
        "is not supported: context parallelism cuts every sequence alike",
        """--hierarchical-context-parallel-sizes --max-seqlen-per-dp-cp-rank
        --hybrid-context-parallel""",
    ),
    refused(
        "is not supported: it shards weights that the base's checkpoint loads whole",
        "--tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards",
    ),
    honoured(
        "data parallelism",
        """--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --ddp-num-buckets --ddp-bucket-size --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-reduce-scatter-with-fp32-accumulation
        --ddp-param-name-patterns-for-fp32-local-accumulation --no-gradient-reduce-div-fusion
        --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32
        --num-distributed-optimizer-instances --no-use-layer-wise-param-layout
        --no-align-grad-reduce --use-nccl-ub --disable-symmetric-registration""",
    ),
    refused(
        "is not supported: the loss is a sum over tokens, which is divided once by their number",
        "--ddp-average-in-collective",
    ),
    refused(
        _FSDP,
        """--use-megatron-fsdp --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward
        --fsdp-manual-registration --data-parallel-sharding-strategy --outer-dp-sharding-strategy
        --fsdp-double-buffer --suggested-communication-unit-size --enable-full-sharding-in-hsdp
        --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype
        --megatron-fsdp-grad-comm-dtype --megatron-fsdp-enable-fine-grained-param-gather
        --megatron-fsdp-max-pool-double-buffer --fsdp-db-use-persist-buf-on-alloc-fail
        --create-all-gather-group --no-strict-fsdp-dtensor-load""",
    ),
    honoured(
        "process groups",
        """--distributed-backend --distributed-timeout-minutes
        --distributed-timeout-seconds-after-init --local-rank --disable-gloo-process-groups
        --nccl-communicator-config-path --use-sharp --sharp-enabled-group
        --high-priority-stream-groups --flight-recorder-dump-path
        --flight-recorder-trace-buffer-size --no-flight-recorder-dump-on-timeout
        --flight-recorder-include-stack-trace --no-flight-recorder-include-only-active
        --no-flight-recorder-extra-dump-on-exec""",
    ),
    refused("is not supported: groups are needed at once", "--lazy-mpu-init --fake-process-group"),
    honoured(
        "checkpoints",
        """--save --save-interval --save-retain-interval --load --ckpt-step
        --override-ckpt-iteration --finetune --exit-on-missing-checkpoint --no-save-optim
        --no-save-rng --no-load-optim --no-load-rng --load-main-params-from-ckpt --async-save
        --async-strategy --use-persistent-ckpt-worker --async-ckpt-cpu-priority
        --async-ckpt-io-priority --async-ckpt-use-cpu-shm --no-ckpt-fully-parallel-save
        --ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo
        --ckpt-fully-parallel-save-process-group --ckpt-fully-parallel-load-process-group
        --ckpt-assume-constant-structure --no-ckpt-load-validate-sharding-integrity
        --dist-ckpt-strictness --dist-ckpt-workers --dist-ckpt-optim-fully-reshardable
        --distrib-optim-fully-reshardable-mem-efficient --verify-integrity
        --non-persistent-save-interval --non-persistent-global-ckpt-dir""",
    ),
    refused(
        "is not supported: only torch_dist checkpoints hold a draft without its base",
        "--ckpt-format",
        unless=("torch_dist",),
    ),
    no_effect(
        "a draft's checkpoints are torch_dist, saved in parallel",
        """--auto-detect-ckpt-format --use-dist-ckpt --dist-ckpt-format
        --ckpt-fully-parallel-save --no-stream-ckpt-dequant""",
    ),
    refused(
        "is not supported: a draft's checkpoint is converted by megatron-eagle convert",
        """--ckpt-convert-format --ckpt-convert-save
        --ckpt-convert-update-legacy-dist-opt-format --dist-ckpt-save-pre-mcore-014""",
    ),
    refused(
        "is not supported; --eagle-warm-start starts from another draft",
        "--pretrained-checkpoint",
    ),
    refused(
        "is not needed: the base's checkpoint says its dimensions",
        """--use-checkpoint-args --use-mp-args-from-checkpoint-args
        --no-use-tokenizer-model-from-checkpoint-args""",
    ),
    refused(
        "is not supported, only global: checkpoints are read from a shared file system",
        "--non-persistent-ckpt-type",
        unless=("global",),
    ),
    refused(
        "belongs to local checkpoints, which are not supported",
        """--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication
        --replication-jump --replication-factor""",
    ),
    refused(
        _DUMPS,
        """--save-params-interval --save-activations-interval --save-tokens-per-expert-interval
        --save-wgrads-interval --save-dgrads-interval""",
    ),
    honoured(
        "NVIDIA's services around a run (not tried)",
        """--no-one-logger --one-logger-project --one-logger-run-name --one-logger-async
        --app-tag-run-name --app-tag-run-version --adlr-autoresume --adlr-autoresume-interval""",
    ),
    honoured(
        "faults on purpose, to test recovery (not tried)",
        """--fault-injector-ranks --fault-injector-num-ranks --fault-injector-fault-types
        --fault-injector-fault-probabilities --fault-injector-fault-delay
        --fault-injector-delay-start-iteration --fault-injector-mtti-seconds
        --fault-injector-offset-seconds --fault-injector-seed""",
    ),
    refused(
        "is not supported: it times parts of Megatron's own forward step",
        """--log-straggler --straggler-ctrlr-port --straggler-minmax-count
        --disable-straggler-on-startup --run-workload-inspector-server""",
    ),
    refused(
        "is not supported: a draft's run is restarted by its launcher, with --load",
        """--inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval
        --inprocess-monitor-process-interval --inprocess-progress-watchdog-interval
        --inprocess-heartbeat-interval --inprocess-soft-timeout --inprocess-hard-timeout
        --inprocess-heartbeat-timeout --inprocess-barrier-timeout --inprocess-completion-timeout
        --inprocess-last-call-wait --inprocess-termination-grace-time --inprocess-granularity
        --inprocess-active-world-size --inprocess-empty-cuda-cache --enable-ft-package
        --calc-ft-timeouts --ft-num-warmup-iters""",
    ),
)
