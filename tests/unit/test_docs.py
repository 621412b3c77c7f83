"""What the documents mention exists, and the tracked files are fit to publish.

Checked in fenced blocks and code spans: repository paths, `make` targets, scripts and subcommands
of `megatron-eagle` and their flags, `--eagle-*` flags. A word with <...>, $ or ... in it is a
placeholder.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_eagle.config.flags import add_eagle_flags
from tools import flag_reference

ROOT = Path(__file__).resolve().parents[2]
PATH_ROOTS = ("megatron_eagle", "tools", "examples", "tests", "docs", "benchmarks", ".ci")
NOT_OURS = {".git", ".venv", "runs", "build", "dist"}

FENCE = re.compile(r"^ *```([\w-]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
EAGLE_FLAG = re.compile(r"(?<![\w-])--(?:no-)?eagle-[a-z0-9-]*[a-z0-9]")
COMMAND = re.compile(r"(?:megatron-eagle|-m megatron_eagle) ([a-z][\w-]*)")
OPTION = re.compile(r"--[a-z][\w-]*")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, PATH_ROOTS))})/[\w./*{{}},-]*")


@cache
def published_files() -> tuple[Path, ...]:
    """Tracked files and new ones that git does not ignore; every file where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
        found = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        found = [
            file
            for file in ROOT.rglob("*")
            if not NOT_OURS.intersection(file.relative_to(ROOT).parts)
        ]
    return tuple(sorted(file for file in found if file.is_file()))


def documents() -> list[Path]:
    tops = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [file for file in [*tops, *sorted(ROOT.glob("docs/**/*.md"))] if file.exists()]


@cache
def sources() -> str:
    """The Python text that can define a flag."""
    folders = ("megatron_eagle", "tools", "examples")
    return "\n".join(f.read_text() for d in folders for f in sorted((ROOT / d).rglob("*.py")))


@cache
def eagle_flags() -> frozenset[str]:
    """The flags of the training command's parser, and the negative form of each."""
    parser = add_eagle_flags(argparse.ArgumentParser(add_help=False))
    flags = [action.option_strings[0] for action in parser._actions]
    return frozenset(f for flag in flags for f in (flag, f"--no-{flag[2:]}"))


@cache
def subcommands() -> dict[str, str]:
    """Each subcommand of ``megatron-eagle`` and the source of its module."""
    folder = ROOT / "megatron_eagle" / "cli"
    for node in ast.parse((folder / "main.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            table = ast.literal_eval(node.value)
            return {name: (folder / f"{row[0]}.py").read_text() for name, row in table.items()}
    raise AssertionError("cli/main.py has no COMMANDS table")


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def expand_braces(word: str) -> Iterator[str]:
    """``a/{b,c}`` -> ``a/b``, ``a/c``."""
    match = re.search(r"\{([^{}]*)\}", word)
    if match is None:
        yield word
        return
    for choice in match[1].split(","):
        yield from expand_braces(word[: match.start()] + choice + word[match.end() :])


def missing_paths(code: str) -> Iterator[str]:
    words = [word for word in code.split() if not re.search(r"[<>$]|\.\.\.", word)]
    for mention in PATH.findall(" ".join(words)):
        for path in expand_braces(mention.rstrip(".,")):
            if not any(ROOT.glob(path.rstrip("/"))):
                yield f"no such path: {path}"


def wrong_commands(code: str) -> Iterator[str]:
    for line in code.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ").split(" #")[0]
        make = re.match(r"(?:[A-Z_]+=\S* )*make((?: [\w.=/-]+)*)\s*$", command)
        for target in make[1].split() if make else []:
            if "=" not in target and not target.startswith("-") and target not in make_targets():
                yield f"no such make target: {target}"
        if subcommand := COMMAND.search(command):
            yield from wrong_subcommand(subcommand[1], command[subcommand.end() :])
            continue
        script = re.search(r"(?:tools|examples)/[\w/]+\.py", command)
        if script is None or script[0] == "examples/pretrain_eagle.py":
            continue  # Megatron's flags are not ours to list; --eagle-* ones are checked everywhere
        for option in OPTION.findall(command[script.end() :]):
            if f'"{option}"' not in sources() and option not in eagle_flags() | {"--help"}:
                yield f"{script[0]} has no {option}"


def wrong_subcommand(name: str, arguments: str) -> Iterator[str]:
    if name not in subcommands():
        yield f"no such subcommand: {name}"
    elif name != "train":  # as above
        for option in OPTION.findall(arguments):
            if f'"{option}"' not in subcommands()[name] and option != "--help":
                yield f"{name} has no {option}"


def problems(text: str) -> list[str]:
    """What a document mentions that is not there."""
    blocks = [body for _, body in FENCE.findall(text)]
    spans = SPAN.findall(FENCE.sub("", text))
    found = []
    for code in [*blocks, *spans]:
        found += [*missing_paths(code), *wrong_commands(code)]
    for flag in EAGLE_FLAG.findall(text):
        if flag not in eagle_flags() and f'"{flag}"' not in sources():
            found.append(f"no such flag: {flag}")
    return found


def broken_links(file: Path, text: str) -> list[str]:
    targets = [link.split("#")[0] for link in LINK.findall(text) if "://" not in link]
    return [
        f"broken link: {target}"
        for target in targets
        if target and not target.startswith("mailto:") and not (file.parent / target).exists()
    ]


def test_the_readme_gives_the_commands_that_ci_runs() -> None:
    readme = ROOT / "README.md"
    assert readme.exists()
    assert {"make train", "make test"} <= set(re.findall(r"make [\w-]+", readme.read_text()))
    assert "make test " in (ROOT / ".ci" / "run").read_text()


def test_no_line_of_the_readme_is_long() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > 120]


def test_the_flag_reference_is_what_its_script_prints() -> None:
    assert flag_reference.PAGE.read_text() == flag_reference.render(), "run `make docs`"
    page = flag_reference.MEGATRON_PAGE.read_text()
    assert page == flag_reference.render_megatron(), "run `make docs`"


def test_documents_mention_only_what_exists() -> None:
    files = documents()
    assert files
    found = []
    for file in files:
        text = file.read_text()
        names = [*problems(text), *broken_links(file, text)]
        found += [f"{file.relative_to(ROOT)}: {name}" for name in names]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`tools/absent.py`", "no such path: tools/absent.py"),
        ("```\ntests/{unit,absent}\n```", "no such path: tests/absent"),
        ("```sh\n$ make setup nonsense\n```", "no such make target: nonsense"),
        ("`make nonsense`", "no such make target: nonsense"),
        ("with --eagle-nonsense 3", "no such flag: --eagle-nonsense"),
        ("```\npython tools/import_base.py \\\n  --nonsense x\n```",
         "tools/import_base.py has no --nonsense"),
        ("`megatron-eagle export --load x`", "no such subcommand: export"),
        ("```\nmegatron-eagle convert --load x \\\n  --hf y\n```", "convert has no --hf"),
        ("```\ntorchrun -m megatron_eagle eval --nonsense\n```", "eval has no --nonsense"),
    ],
)  # fmt: skip
def test_the_checker_catches(text: str, expected: str) -> None:
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "`tests/unit/test_<name>.py` and `tests/*/test_docs.py`",
        "```sh\nmake setup PYTHON=python3.12  # once\nmake test ARGS='-k docs'\n```",
        "`--eagle-ttt-steps 3` and `--no-eagle-compile`",
        "```sh\ntorchrun --nproc-per-node 2 examples/pretrain_eagle.py --lr 1 --eagle-nvtx\n```",
        "make sure that it works",
        "`megatron-eagle --help`, `megatron-eagle SUBCOMMAND ...` and `megatron-eagle eval --help`",
        "`torchrun --nproc-per-node 2 -m megatron_eagle eval --tensor-model-parallel-size 2`",
    ],
)
def test_the_checker_accepts(text: str) -> None:
    assert problems(text) == []


def test_the_checker_finds_a_broken_link() -> None:
    text = "[a](absent.md) [b](LICENSE) [c](https://example.org/x) [d](#anchor)"
    assert broken_links(ROOT / "README.md", text) == ["broken link: absent.md"]


def test_no_published_file_is_large() -> None:
    sizes = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in published_files()}
    assert len(sizes) > 20
    assert not [name for name, size in sizes.items() if size > 2_000_000]


def test_no_python_file_is_long() -> None:
    python = [file for file in published_files() if file.suffix == ".py"]
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in python}
    assert not [(f, n) for f, n in lengths.items() if n > 300 and f.parts[0] != "tests"]


def test_no_published_file_names_a_machine() -> None:
    # Spelled in two halves, so that this file does not trip over itself.
    folders = [("/" + name + "/").encode() for name in ("work", "root")]
    assert not [
        file.relative_to(ROOT)
        for file in published_files()
        if any(folder in file.read_bytes() for folder in folders)
    ]
