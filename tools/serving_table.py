"""Write the table of bases, algorithms and servers into docs/guide/serving.md: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_eagle.hf.base.families import FAMILIES
from megatron_eagle.hf.draft.servers import COUNTS_FROM_FIRST, SERVERS, Server

PAGE = Path("docs/guide/serving.md")
BEGIN, END = "<!-- bases: written by tools/serving_table.py -->\n", "<!-- end of bases -->\n"
ALGORITHMS = {
    "EAGLE-3, 3.1": ("vllm", "sglang", "trtllm"),
    "P-EAGLE": ("vllm",),
    "EAGLE-1": ("vllm", "sglang"),
}
"""Algorithms as columns -> the servers that read such drafts."""


def table() -> str:
    """Return the Markdown table: a row for every base that can be imported."""
    columns = [(title, server) for title, servers in ALGORITHMS.items() for server in servers]
    names = [f"{title}: {SERVERS[server].release}" for title, server in columns]
    rows = [["base", *names], ["---"] * (len(columns) + 1)]
    for family in FAMILIES.values():
        cells = [_cell(title, SERVERS[server], family.architecture) for title, server in columns]
        rows.append([f"`{family.architecture}`", *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(algorithm: str, server: Server, architecture: str) -> str:
    known = server.final_state if algorithm == "EAGLE-1" else server.aux_states
    if known is None:
        return "not read"
    if architecture not in known:
        return "no"
    own_ids = server.title == "SGLang" and architecture in COUNTS_FROM_FIRST
    return "yes, ids below" if own_ids and algorithm != "EAGLE-1" else "yes"


def with_table(page: str) -> str:
    """Return ``page`` with the table between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> int:
    """Rewrite the page."""
    page = Path(__file__).resolve().parents[1] / PAGE
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
