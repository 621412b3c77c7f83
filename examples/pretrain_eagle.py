"""Train an EAGLE draft on a frozen base inside Megatron's trainer.

The same as ``megatron-eagle train``, as a script to copy and change:

    torchrun --nproc-per-node 2 examples/pretrain_eagle.py \\
        --eagle-base-checkpoint BASE --eagle-train-data answers.jsonl \\
        --eagle-draft-vocab-size 8192 --tensor-model-parallel-size 2 --seq-length 256 \\
        --micro-batch-size 1 --global-batch-size 1 --train-iters 1000 --lr 2e-3 \\
        --save DRAFT --save-interval 500

Every flag of Megatron's trainer works; ``--help`` lists them and the ``--eagle-*`` flags. The
base's dimensions are read from its checkpoint.
"""

from megatron_eagle.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
