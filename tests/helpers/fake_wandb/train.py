"""Train with the package ``wandb`` beside this file."""

from megatron_eagle.cli.train import main

if __name__ == "__main__":
    main()
