"""Tokenize chat or text JSONL into Megatron .bin/.idx with a loss mask, for --eagle-train-data.

    megatron-eagle prepare-data --input chats.jsonl --tokenizer HF_DIR --output-prefix data/chats

Lines hold "messages" (OpenAI), "conversations" (ShareGPT), "text", or "prompt_ids" and
"answer_ids". A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_eagle.cli.boundary import at_least_one, flags_of, run
from megatron_eagle.errors import UserError, literal

if TYPE_CHECKING:
    from megatron_eagle.data.chat.records import RecordOptions


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a user's mistake."""
    args = _parser(prog).parse_args(argv)
    return run(partial(_prepare, args), flags_of(args))


def _prepare(args: argparse.Namespace) -> int:
    if args.output_prefix is None and args.show is None:
        raise UserError("<output_prefix> is missing, and no <show> asks for a look")
    options = _options(args)  # before the imports, which take seconds
    from megatron_eagle.data.chat.prepare import prepare
    from megatron_eagle.data.chat.show import shown

    if args.show is not None:
        for line in shown(args.input, options, args.show):
            print(line, flush=True)
    if args.output_prefix is None:
        return 0
    summary = prepare(
        args.input,
        args.output_prefix,
        options,
        workers=args.workers,
        skip_bad=args.skip_bad_lines,
        overwrite=args.overwrite,
        progress=lambda line: print(line, flush=True),
    )
    print(
        f"{args.output_prefix}: {summary['documents']:,} documents of {summary['records']:,} "
        f"records, {summary['tokens']:,} tokens, {summary['supervised_tokens']:,} supervised, the "
        f"longest {summary['longest_document']:,}"
    )
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL files")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH",
        help="Hugging Face directory, or a SentencePiece .model file",
    )  # fmt: skip
    parser.add_argument("--output-prefix", metavar="PREFIX", help="of the data set's files")
    parser.add_argument(
        "--show", type=int, metavar="N",
        help="print the first N conversations with supervised text marked; without "
        "--output-prefix nothing else is done",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Jinja file instead of the tokenizer's template"
    )
    parser.add_argument(
        "--thinking", choices=["on", "off"],
        help="render with enable_thinking true or false (default: as the template does)",
    )  # fmt: skip
    parser.add_argument(
        "--template-options", default="{}", metavar="JSON",
        help="object of further variables the template reads",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, help="of the base, if it is not the tokenizer's: ids are checked"
    )
    parser.add_argument(
        "--no-append-eod", action="store_true", help="no end-of-sequence token after plain texts"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--skip-bad-lines", action="store_true",
        help="leave bad lines out and list them in PREFIX.bad.txt, instead of stopping at one",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier data set")
    return parser


def _options(args: argparse.Namespace) -> RecordOptions:
    at_least_one(args, "workers", "vocab_size", "show")
    source = f"<template_options> {literal(args.template_options)}"
    try:
        variables: Any = json.loads(args.template_options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({literal(error)})") from None
    if not isinstance(variables, dict):
        raise UserError(f"{source}: not a JSON object")
    from megatron_eagle.data.chat.records import RecordOptions
    from megatron_eagle.data.chat.rendering import RESERVED

    if reserved := sorted(RESERVED & set(variables)):
        raise UserError(f"{source}: {reserved[0]} is no variable of a template's own")
    if args.thinking is not None:
        variables["enable_thinking"] = args.thinking == "on"
    return RecordOptions(
        tokenizer=args.tokenizer,
        template=args.chat_template,
        template_options=variables,
        vocab_size=args.vocab_size,
        append_eod=not args.no_append_eod,
    )
