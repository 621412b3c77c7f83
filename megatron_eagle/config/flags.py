"""The ``--eagle-*`` flags, made of the fields of :class:`DraftSpec` and :class:`TrainOptions`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from megatron_eagle.config.eagle_config import OPTIONS, EagleConfig
from megatron_eagle.config.option import flag_name
from megatron_eagle.config.spec import DraftSpec
from megatron_eagle.config.train_options import TrainOptions
from megatron_eagle.errors import UserError


def add_eagle_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Declare one ``--eagle-*`` flag per option and return ``parser``."""
    for kind, title in ((DraftSpec, "eagle: the draft"), (TrainOptions, "eagle: its training")):
        group = parser.add_argument_group(title, (kind.__doc__ or "").splitlines()[0])
        for option in dataclasses.fields(kind):
            flag = dict(option.metadata["flag"])
            if isinstance(option.default, bool):
                flag["action"] = "store_true"
            else:
                flag["default"] = option.default
            text = option.metadata["help"]
            if option.default not in (None, False):
                text += f" (default: {option.default})"
            group.add_argument(flag_name(option.name), help=text.replace("%", "%%"), **flag)
    return parser


def given_options(argv: Sequence[str]) -> set[str]:
    """Return the names of the options whose flags are in ``argv``."""
    parser = add_eagle_flags(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    unset = object()  # argparse.SUPPRESS is a string, which a flag's type would convert
    parser.set_defaults(**{f"eagle_{name}": unset for name in OPTIONS})
    typed = parser.parse_known_args(argv)[0]
    return {name for name in OPTIONS if getattr(typed, f"eagle_{name}") is not unset}


def parse_eagle_flags(argv: Sequence[str]) -> EagleConfig:
    """Parse the options in ``argv``, other flags ignored. Needs neither torch nor Megatron."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    config = EagleConfig.from_args(add_eagle_flags(parser).parse_known_args(argv)[0])
    if config.train.base_checkpoint is None:
        raise UserError("<base_checkpoint> is required: the base to train a draft for")
    return config
