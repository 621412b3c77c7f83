"""Flags that describe a network: the base's come from its checkpoint, other kinds are refused."""

from __future__ import annotations

from megatron_eagle.training.flag_table.judgement import honoured, no_effect, of_base, refused

JUDGEMENTS = (
    of_base(
        "size",
        """--num-layers --encoder-num-layers --hidden-size --ffn-hidden-size --num-attention-heads
        --num-query-groups --group-query-attention --kv-channels --vocab-size
        --untie-embeddings-and-output-weights""",
    ),
    of_base(
        "norms, biases, activation, dropout",
        """--normalization --norm-epsilon --apply-layernorm-1p --qk-layernorm --qk-l2-norm
        --disable-bias-linear --add-qkv-bias --swiglu --quick-geglu --squared-relu --openai-gelu
        --glu-linear-offset --activation-func-clamp-value --hidden-dropout --attention-dropout
        --apply-residual-connection-post-layernorm --fp32-residual-connection""",
    ),
    of_base(
        "attention",
        """--window-size --window-attn-skip-freq --softmax-type --attention-output-gate
        --apply-query-key-layer-scaling --multi-latent-attention --q-lora-rank --kv-lora-rank
        --qk-head-dim --qk-pos-emb-head-dim --v-head-dim""",
    ),
    of_base(
        "positions",
        """--position-embedding-type --rotary-base
        --rotary-percent --rotary-interleaved --rotary-seq-len-interpolation-factor
        --use-rope-scaling --rope-scaling-factor --rope-type --rotary-scaling-factor --mscale
        --mscale-all-dim --no-rope-freq --no-position-embedding --mrope-section
        --yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow
        --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int
        --relative-attention-num-buckets --relative-attention-max-distance""",
    ),
    of_base(
        "experts",
        """--num-experts --moe-layer-freq --moe-ffn-hidden-size --moe-router-topk
        --moe-router-num-groups --moe-router-group-topk --moe-router-pre-softmax
        --moe-router-topk-scaling-factor --moe-router-score-function
        --moe-router-enable-expert-bias --moe-shared-expert-intermediate-size
        --moe-shared-expert-gate --moe-latent-size --moe-apply-probs-on-input
        --moe-expert-capacity-factor --moe-pad-expert-input-to-capacity --moe-token-drop-policy
        --moe-input-jitter-eps --moe-router-force-load-balancing --moe-router-force-biased
        --moe-mlp-glu-interleave-size --moe-shared-expert-glu-interleave-size""",
    ),
    no_effect(
        "the base's experts are frozen, and a draft's have --eagle-moe-aux-loss-coeff",
        """--moe-router-load-balancing-type --moe-aux-loss-coeff --moe-z-loss-coeff
        --moe-router-bias-update-rate --moe-router-quantile-balancing-ema
        --moe-per-layer-logging""",
    ),
    no_effect("the base says which positions it has", "--use-rotary-position-embeddings"),
    no_effect(
        "the base's own number of positions is the limit",
        "--max-position-embeddings",
    ),
    no_effect(
        "the vocabulary is padded as the base's checkpoint says, and the draft's not at all",
        "--make-vocab-size-divisible-by",
    ),
    refused(
        "is no GPT option",
        "--decoder-num-layers --bert-no-binary-head --onnx-safe",
    ),
    of_base(
        "layers of a hybrid model",
        """--linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim
        --linear-num-key-heads --linear-num-value-heads --mamba-state-dim --mamba-head-dim
        --mamba-num-groups --mamba-num-heads""",
    ),
    honoured(
        "cuts a hybrid base into pipeline stages by |; its layers are the base's",
        "--hybrid-layer-pattern",
    ),
    refused(
        "is not needed: the base's --hybrid-layer-pattern says what its layers are",
        """--is-hybrid-model --hybrid-override-pattern --disable-mamba-mem-eff-path
        --mamba-training-ssm-states-dtype --linear-attention-freq""",
    ),
    refused(
        "is an experimental kind of attention, which no base here has",
        """--experimental-attention-variant --dsa-indexer-n-heads --dsa-indexer-head-dim
        --dsa-indexer-topk --dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset
        --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss --dsa-kernel-backend
        --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
        --no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32""",
    ),
    refused(
        "chooses another model than the base and its draft",
        """--spec --yaml-cfg --heterogeneous-layers-config-path
        --heterogeneous-layers-config-encoded-json --enable-experimental""",
    ),
    refused(
        "scales weights and activations by width, which a trained base was not",
        """--use-mup --mup-width-mult --mup-base-hidden-size --mup-embedding-mult
        --mup-output-mult --mup-base-head-dim --mup-attn-scale-power""",
    ),
    refused(
        "is not supported yet: a base's multi-token-prediction heads are not trained",
        """--mtp-num-layers --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-detach-heads
        --mtp-hybrid-override-pattern --mtp-standalone""",
    ),
    refused(
        "makes a mixture of experts out of a dense model, and the base stays as it is",
        "--moe-use-upcycling --moe-upcycling-granularity",
    ),
    refused(
        "pads or extends a vocabulary, and the base's is fixed",
        "--padded-vocab-size --no-pad-vocab-size",
    ),
)
