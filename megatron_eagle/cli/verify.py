"""Check that nothing is missing from a base, a draft, a feature store or a data set, nor damaged.

    megatron-eagle verify PATH [PATH ...]

Reads every byte. Exit status: 0, or 2 after one line that names the first file at fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME, TRACKER_NAME
from megatron_eagle.cli.boundary import flags_of, run
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "path", nargs="+", metavar="PATH",
        help="directory of a base, imported or saved by Megatron, of a draft that training saved "
        "(or one iteration of either), or of features, or the prefix of a data set",
    )  # fmt: skip
    args = parser.parse_args(argv)
    # A positional argument has no flag: its value alone names it.
    return run(partial(_verify, args.path), flags_of(args, path="path", base_checkpoint="base"))


def _verify(paths: Sequence[str]) -> int:
    for path in paths:
        with reading("path", path):
            print(f"{path}: {_verified(path)}", flush=True)
    return 0


def _verified(path: str) -> str:
    """Check ``path`` and return what it holds; raise ``UserError`` for anything else."""
    from megatron_eagle.data.indexed import dataset_exists

    directory = Path(path)
    if (directory / BASE_JSON_NAME).is_file():
        from megatron_eagle.hf.base.verify import verify_base

        size = verify_base(directory)
        return f"a base, {size / 2**30:.2f} GiB of weights with the fingerprint they were given"
    if (directory / "plan.json").is_file() or (directory / "index.json").is_file():
        from megatron_eagle.data.features.store import verify

        verify(directory)
        return "features, all checksums are right"
    if (directory / TRACKER_NAME).is_file() or (directory / ".metadata").is_file():
        from megatron_eagle.checkpoint.native.verify import is_base, verify_native_base

        if is_base(directory):
            return verify_native_base(directory)
        from megatron_eagle.hf.draft.verify import verify_draft

        return f"a draft, {verify_draft(directory) / 2**20:.1f} MiB, all checksums are right"
    if dataset_exists(path):
        from megatron_eagle.data.verify import verify_data_set

        return f"a data set of {verify_data_set(path):,} documents"
    raise UserError(
        f"<path> {literal(path)}: no base, no draft checkpoint, no features, and no prefix of a "
        "data set"
    )
