"""Run ``megatron-eagle`` as ``python -m megatron_eagle``, which ``torchrun -m`` can start too."""

from megatron_eagle.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
