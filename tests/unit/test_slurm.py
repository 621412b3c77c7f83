"""Processes that ``srun`` starts without torchrun."""

from __future__ import annotations

import pytest

from megatron_eagle.cli import main as command
from megatron_eagle.cli.slurm import adopt_slurm, first_host
from megatron_eagle.errors import UserError

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "41234",
}


def test_a_step_of_several_tasks_is_one_run() -> None:
    environ = dict(STEP)
    adopt_slurm(environ)
    set_now = {name: value for name, value in environ.items() if name not in STEP}
    assert set_now == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "21234",
    }


@pytest.mark.parametrize(
    "environ",
    [
        {**STEP, "WORLD_SIZE": "8", "RANK": "3"},  # torchrun inside the step
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {},
    ],
)
def test_other_processes_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_an_incomplete_step_is_refused() -> None:
    environ = {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(UserError, match="16 tasks, but SLURM_LOCALID is not set; use torchrun"):
        adopt_slurm(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[01-04,07],login1", "gpu01"),
        ("gpu3", "gpu3"),
        ("a,b", "a"),
        ("n[1,3]", "n1"),
        ("rack[2-3]-x", "rack2-x"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_command_of_one_process_refuses_several_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert command.main(["convert"]) == 2
    assert capsys.readouterr().err == "error: convert runs in one process, srun started 16\n"
