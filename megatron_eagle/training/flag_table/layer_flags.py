"""Flags of how layers compute: precision, kernels, recomputation, offloading, CUDA graphs."""

from __future__ import annotations

from megatron_eagle.training.flag_table.judgement import honoured, no_effect, refused

_GRAPHS = "captures static shapes, and micro-batches are cut to the length of their data"
_FP8 = (
    "is not supported: the base runs without gradients, where Transformer Engine never updates its "
    "scales, and a draft's passes have other shapes in every micro-batch"
)
_OVERLAP = "needs buffers of one shape, and micro-batches are cut to the length of their data"
_OFFLOADING = "is not supported: the base keeps no activations, and a draft runs K passes"

JUDGEMENTS = (
    honoured("precision", "--bf16 --fp16 --disable-bf16-reduced-precision-matmul"),
    honoured(
        "loss scale, with --fp16 (not tried)",
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
    ),
    refused(
        "chooses layers that are not supported, only local and transformer_engine",
        "--transformer-impl",
        unless=("local", "transformer_engine"),
    ),
    refused(
        "is not supported: it asks for Megatron's quadratic attention",
        "--attention-backend",
        unless=("auto", "flash", "fused", "unfused"),
    ),
    honoured("kernels of Transformer Engine's attention", "--flash-attention-version"),
    honoured(
        "fusions",
        """--no-rope-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
        --no-bias-gelu-fusion --no-bias-dropout-fusion --no-persist-layer-norm
        --no-gradient-accumulation-fusion --disable-jit-fuser""",
    ),
    honoured(
        "dispatch of the base's tokens to experts",
        """--moe-token-dispatcher-type --moe-grouped-gemm --moe-permute-fusion
        --moe-router-fusion --moe-router-dtype --moe-shared-expert-overlap""",
    ),
    refused(
        "needs a token dispatcher that was never tried with a frozen base",
        """--moe-enable-deepep --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
        --moe-hybridep-pad-uneven-dispatch-inputs --moe-flex-dispatcher-num-sms
        --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute
        --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing
        --moe-ncclep-static-shape --moe-ncclep-zero-copy --moe-expert-rank-capacity-factor
        --high-priority-a2a-comm-stream""",
    ),
    refused(
        "stores experts or shared experts in a way that the base's checkpoint does not have",
        """--moe-single-grouped-weight --moe-single-grouped-bias --use-grouped-gemm-for-dense-mlp
        --use-grouped-gemm-for-shared-expert --mla-down-proj-fusion""",
    ),
    no_effect(
        "the loss is this package's own, on the draft's vocabulary shard",
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --fp16-lm-cross-entropy",
    ),
    no_effect(
        "attention sums its softmax in fp32, by flash kernels, anyway",
        "--attention-softmax-in-fp32 --use-flash-attn",
    ),
    no_effect(
        "the base's embedding has no gradient",
        "--no-clone-scatter-output-in-embedding",
    ),
    refused(
        "replaces modules whose inputs a draft's layers change",
        """--use-transformer-engine-op-fuser --fused-residual-rmsnorm --use-te-activation-func
        --use-fused-weighted-squared-relu --batch-invariant-mode""",
    ),
    refused(
        "needs Megatron's own attention",
        """--qk-clip --qk-clip-alpha --qk-clip-threshold --log-max-attention-logit
        --cache-mla-latents""",
    ),
    refused(
        _FP8,
        """--fp8-format --fp8-recipe --fp8-quantizer-factory --fp8-margin --fp8-interval
        --fp8-amax-history-len --fp8-amax-compute-algo --no-fp8-wgrad --fp8-output-proj
        --fp8-param-gather --first-last-layers-bf16 --num-layers-at-start-in-bf16
        --num-layers-at-end-in-bf16 --fp4-format --fp4-recipe --fp4-quantizer-factory
        --fp4-param-gather --te-precision-config-file --keep-fp8-transpose-cache
        --reuse-grad-buf-for-mxfp8-param-ag --moe-router-padding-for-quantization
        --moe-router-padding-for-fp8 --use-kitchen-attention --kitchen-attention-backend
        --kitchen-config-file --kitchen-recipe-number""",
    ),
    refused(
        _OVERLAP,
        """--tp-comm-overlap --tp-comm-overlap-cfg --no-tp-comm-bulk-wgrad
        --no-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs
        --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --no-tp-comm-split-rs
        --tp-comm-bootstrap-backend""",
    ),
    refused(
        _GRAPHS,
        """--enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-scope
        --cuda-graph-modules --cuda-graph-warmup-steps --optimizer-cuda-graph
        --decode-only-cuda-graphs --inference-cuda-graph-scope""",
    ),
    refused(
        "reorders the passes of a layer, and a draft runs each K times",
        """--overlap-moe-expert-parallel-comm --delay-wgrad-compute
        --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release
        --defer-embedding-wgrad-compute --wgrad-deferral-limit""",
    ),
    refused(
        _OFFLOADING,
        """--cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers
        --fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks
        --activation-offload-fraction --fine-grained-offloading-max-inflight-offloads
        --moe-paged-stash --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda
        --moe-paged-stash-buffer-size-factor-cpu""",
    ),
    honoured("recomputation of the draft's MLPs", "--recompute-activations --recompute-modules"),
    refused(
        "is not supported: later steps attend to the keys of earlier ones; use "
        "--recompute-granularity selective --recompute-modules mlp",
        "--recompute-granularity",
        unless=("selective",),
    ),
    refused(
        "belongs to --recompute-granularity full, which is not supported",
        "--recompute-method --recompute-num-layers --distribute-saved-activations",
    ),
    refused(
        "is not supported: experts are not recomputed",
        "--moe-layer-recompute",
    ),
    refused(
        "cuts a sequence into chunks, and a draft's steps attend to all of it",
        "--mlp-chunks-for-training",
    ),
    refused(
        "is not supported yet: the base's weights are loaded as its layers are built",
        "--init-model-with-meta-device",
    ),
)
