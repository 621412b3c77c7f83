"""``megatron-eagle``: its subcommands, and how a user's mistake ends one."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from megatron_eagle.cli import boundary, convert, extract_features, train
from megatron_eagle.cli.main import COMMANDS, main
from megatron_eagle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HELP_WITHOUT_TORCH = """
import contextlib, io, sys
from megatron_eagle.cli.main import COMMANDS, main
main(["--help"])
for name in COMMANDS.keys() - {"train"}:
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        main([name, "--help"])
    assert text.getvalue().startswith(f"usage: megatron-eagle {name} "), text.getvalue()
print(sorted({"torch", "megatron.core", "transformers"} & sys.modules.keys()))
"""


def test_pip_installs_the_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["megatron-eagle"].split(":")
    assert getattr(import_module(module), function) is main


def test_help_needs_no_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_an_unknown_subcommand_is_refused_in_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "megatron_eagle", "export", "--load", "x"],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: export: no such subcommand, choose from train, ")
    assert result.stderr.count("\n") == 1


def test_no_subcommand_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: megatron-eagle SUBCOMMAND")


def test_a_subcommand_gets_the_words_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare-data", "--input", "a", "--tokenizer", "b", "--output-prefix", "c",
                 "--workers", "0"]) == 2  # fmt: skip
    assert capsys.readouterr().err == "error: --workers must be at least 1, not 0\n"


def test_every_subcommand_has_a_script_of_its_own() -> None:
    """People's own scripts call ``tools/*.py`` and the example."""
    scripts = [*(ROOT / "tools").glob("*.py"), ROOT / "examples" / "pretrain_eagle.py"]
    imported = {
        node.module
        for script in scripts
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    modules = {f"megatron_eagle.cli.{module}" for module, _ in COMMANDS.values()}
    assert modules <= imported


def test_choices_listed_without_an_import_equal_those_of_the_code() -> None:
    from megatron_eagle.data.features import codec
    from megatron_eagle.hf.draft import export, formats

    assert tuple(formats.FORMATS) == convert.FORMATS
    assert tuple(export.DTYPES) == convert.DTYPES
    assert codec.STORED_DTYPES == extract_features.STORED_DTYPES


FLAGS = boundary.flags_of(argparse.Namespace(base="b", max_new_tokens=3), base_checkpoint="--base")


def fails(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("<base_checkpoint> a: none"), "error: --base a: none"),
        (UserError("<max_new_tokens> 3 of <unknown>"), "error: --max-new-tokens 3 of unknown"),
        (ValueError("bad weights"), "error: bad weights"),
        (FileNotFoundError(2, "No such file", "a"), "error: [Errno 2] No such file: 'a'"),
    ],
)
def test_a_mistake_is_one_line_with_the_command_s_flags(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert boundary.run(lambda: fails(error), FLAGS) == 2
    assert capsys.readouterr().err == line + "\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError):
        boundary.run(lambda: fails(RuntimeError("a bug")), FLAGS)
    for error in (ValueError("inside torch"), OSError("connection lost")):
        with pytest.raises(type(error)):
            boundary.run(lambda error=error: fails(error), FLAGS, train._is_mistake)
    assert boundary.run(lambda: fails(UserError("a")), FLAGS, train._is_mistake) == 2


def test_the_status_of_a_command_is_kept() -> None:
    assert boundary.run(lambda: 1, FLAGS) == 1


def test_the_first_rank_speaks_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(boundary.time, "sleep", naps.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        boundary.run(lambda: fails(UserError("a")), FLAGS)
    assert naps == [boundary.GRACE_SECONDS]
    assert capsys.readouterr().err == "error: a\n" * 2


@pytest.mark.parametrize(
    ("parameter", "flag"),
    [
        ("num_layers", "--eagle-num-layers"),
        ("tensor_model_parallel_size", "--tensor-model-parallel-size"),
        ("prompts", "--eagle-eval-prompts"),
    ],
)
def test_training_names_its_own_flag_or_megatron_s(parameter: str, flag: str) -> None:
    assert train.flag_of(parameter) == flag


def test_an_error_inside_another_keeps_its_parameters() -> None:
    from megatron_eagle.errors import message_of

    outer = UserError(f"<warm_start> {message_of(UserError('a: <aux_layers> differ'))}")
    assert outer.named(train.flag_of) == "--eagle-warm-start a: --eagle-aux-layers differ"
    assert str(outer) == "warm_start a: aux_layers differ"
    assert message_of(ValueError("plain")) == "plain"


def test_a_users_text_is_not_read_as_a_parameter() -> None:
    from megatron_eagle.errors import literal, message_of

    text = "token <aux_layers> is unknown"
    for kept in (literal(text), message_of(ValueError(text))):
        error = UserError(f"<tokenizer> a: {kept}")
        assert error.named(train.flag_of).endswith(f" a: {text}") and str(error).endswith(text)


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert boundary.run(interrupted, boundary.flag) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_is_one_line_and_its_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> int:
        def command() -> int:
            raise error

        return boundary.run(command, boundary.flag)

    assert failing(UserError("<save> a\nb")) == 2
    assert capsys.readouterr().err == "error: --save a b\n"
    assert failing(MemoryError()) == 2
    assert capsys.readouterr().err == "error: out of memory\n"
    monkeypatch.setenv("MEGATRON_EAGLE_TRACEBACK", "1")
    assert failing(UserError("<save> a")) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: --save a\n")
