"""Store a base's hidden states for training: the same as ``megatron-eagle extract-features``.

    torchrun --nproc-per-node 8 tools/extract_features.py --base BASE --data data/chats \\
        --seq-length 2048 --tensor-model-parallel-size 4 --output FEATURES
"""

from megatron_eagle.cli.extract_features import main

if __name__ == "__main__":
    raise SystemExit(main())
