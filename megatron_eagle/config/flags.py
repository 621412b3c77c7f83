"""The ``--eagle-*`` flags, made of the fields of :class:`~megatron_eagle.config.EagleConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from megatron_eagle.config import EagleConfig
from megatron_eagle.config.checks import flag_name


def add_eagle_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Declare one ``--eagle-*`` flag per field of :class:`EagleConfig` and return ``parser``."""
    group = parser.add_argument_group("eagle", "the draft and its training")
    for option in dataclasses.fields(EagleConfig):
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
    """The fields of :class:`EagleConfig` whose flags are in ``argv``."""
    parser = add_eagle_flags(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    names = [option.name for option in dataclasses.fields(EagleConfig)]
    unset = object()  # argparse.SUPPRESS is a string, which a flag's type would convert
    parser.set_defaults(**{f"eagle_{name}": unset for name in names})
    given = parser.parse_known_args(argv)[0]
    return {name for name in names if getattr(given, f"eagle_{name}") is not unset}


def parse_eagle_flags(argv: Sequence[str]) -> EagleConfig:
    """The options in ``argv``, other flags ignored. Needs neither torch nor Megatron."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    options = EagleConfig.from_args(add_eagle_flags(parser).parse_known_args(argv)[0])
    if options.base_checkpoint is None:
        raise ValueError("--eagle-base-checkpoint is required: the base to train a draft for")
    return options
