"""Megatron's own parser of some 700 flags, which takes long to build: made once in a process."""

from __future__ import annotations

import argparse
from functools import cache

from megatron_eagle import compat


@cache
def megatron_parser() -> argparse.ArgumentParser:
    """Return the parser, without ``--help``; a parser with more flags has it among its ``parents``
    and leaves it as it is."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    compat.add_megatron_arguments(parser)
    return parser
