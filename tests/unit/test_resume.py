"""What --load resumes: found, whole, and the run that it was; or one line that names the flag."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.checkpoint.writer import write_torch_dist
from megatron_eagle.cli.train import flag_of
from megatron_eagle.errors import UserError
from megatron_eagle.training.data_record import document_record, indexed_record
from megatron_eagle.training.megatron_refusals import check_save, in_one_line
from megatron_eagle.training.nan_stop import nan_flags, noted_iterations
from megatron_eagle.training.resume import check_resume, resumed_checkpoint
from tests.helpers.trained_draft import TrainedDraft, chunked

RUN: dict[str, Any] = {
    "load": "there", "save": None, "ckpt_step": None, "finetune": False, "no_load_optim": False,
    "use_distributed_optimizer": False, "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1, "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False, "global_batch_size": 4, "train_iters": 20,
    "train_samples": None, "lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "cosine",
    "lr_decay_iters": None, "lr_decay_samples": None, "lr_warmup_iters": 0,
    "lr_warmup_samples": 0, "lr_warmup_fraction": None, "weight_decay": 0.01,
    "start_weight_decay": 0.01, "end_weight_decay": 0.01, "weight_decay_incr_style": "constant",
}  # fmt: skip


def checkpoint(
    folder: Path, content: dict[str, Any] | None = None, **saved: Any
) -> CheckpointReader:
    """A checkpoint of a run with the flags ``RUN``, but for ``saved``."""
    draft = TrainedDraft.make()
    common = {
        "args": Namespace(**{**RUN, "lr_decay_iters": 20, **saved}),
        "opt_param_scheduler": {"max_lr": 1e-3},
        **(content or {}),
    }
    write_torch_dist(folder, chunked(draft.tensors()), common, {})
    return CheckpointReader.open(folder)


def complaint(before: CheckpointReader, **now: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_resume(Namespace(**{**RUN, **now}), before)
    return caught.value.named(flag_of)


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ({}, {"train_iters": 40}, "--train-iters 40: the run in --load there had 20"),
        ({}, {"global_batch_size": 8}, "--global-batch-size 8: the run in --load there had 4"),
        ({}, {"lr": 2e-3}, "--lr 0.002: "),
        ({}, {"lr_warmup_fraction": 0.1}, "--lr-warmup-fraction 0.1: "),
        ({"lr_decay_style": "linear"}, {}, "--lr-decay-style cosine: "),
        ({}, {"start_weight_decay": 0.1, "weight_decay": 0.1}, "--weight-decay 0.1: "),
        ({}, {"use_distributed_optimizer": True}, "without --use-distributed-optimizer; leave"),
        ({"use_distributed_optimizer": True}, {}, "with --use-distributed-optimizer; add it"),
        (
            {"use_distributed_optimizer": True},
            {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2},
            "at tensor and pipeline parallelism 1 and 1, this run has 2 and 1",
        ),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_its_flag(
    saved: dict[str, Any], now: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    before = checkpoint(tmp_path, **saved)
    line = complaint(before, **now)
    assert expected in line and "\n" not in line
    for way_out in ("no_load_optim", "finetune"):
        check_resume(Namespace(**{**RUN, **now, way_out: True}), before)


def test_the_same_run_and_ways_out_are_accepted(tmp_path: Path) -> None:
    before = checkpoint(tmp_path)
    check_resume(Namespace(**RUN), before)
    check_resume(Namespace(**RUN | {"lr_decay_iters": 20}), before)
    for way in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        check_resume(Namespace(**RUN | {"train_iters": 40, way: True}), before)
    # A draft that was imported has no run behind it.
    TrainedDraft.make().save(tmp_path / "imported")
    check_resume(
        Namespace(**RUN | {"train_iters": 40}), CheckpointReader.open(tmp_path / "imported")
    )


def test_reshardable_optimizers_change_layouts(tmp_path: Path) -> None:
    content = {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    before = checkpoint(tmp_path, content, use_distributed_optimizer=True)
    now = {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2}
    check_resume(Namespace(**{**RUN, **now}), before)


def test_an_empty_load_begins_a_run_only_where_save_is(tmp_path: Path) -> None:
    there, typo = tmp_path / "there", tmp_path / "tehre"
    assert resumed_checkpoint(Namespace(**RUN | {"load": None})) is None
    both = {"load": str(there), "save": f"{tmp_path}/./there"}
    assert resumed_checkpoint(Namespace(**RUN | both)) is None
    for save in (None, str(there)):
        with pytest.raises(UserError, match=f"^load {typo}: no checkpoint there"):
            resumed_checkpoint(Namespace(**RUN | {"load": str(typo), "save": save}))
    TrainedDraft.make().save(there)
    found = resumed_checkpoint(Namespace(**RUN | {"load": str(there)}))
    assert found is not None and found.directory.name == "iter_0000120"
    with pytest.raises(UserError, match="iter_0000007: no such checkpoint directory"):
        resumed_checkpoint(Namespace(**RUN | {"load": str(there), "ckpt_step": 7}))
    next(there.rglob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"^load .*distcp: shard file is missing"):
        resumed_checkpoint(Namespace(**RUN | {"load": str(there)}))


def test_a_save_without_an_interval_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--save x needs --save-interval"):
        check_save(["--save", "x"])
    check_save(["--save", "x", "--save-interval", "5"])
    check_save([])


def test_megatron_s_assertions_are_one_line() -> None:
    def parse(error: Exception | None) -> None:
        if error is not None:
            raise error
        raise AssertionError

    expected = "Megatron refuses these flags: raise AssertionError"
    with pytest.raises(UserError, match=expected):
        in_one_line(parse, error=None)
    with pytest.raises(UserError, match=r"^Megatron refuses these flags: no <lr> here$"):
        in_one_line(parse, error=RuntimeError("no <lr> here\nand more"))


def test_an_iteration_that_gave_nan_twice_is_left_out(tmp_path: Path) -> None:
    stop = ["--rerun-mode", "disabled"]
    assert nan_flags([], {}) == nan_flags([], {7: 1}) == stop
    assert nan_flags([], {9: 2, 7: 2, 8: 1}) == [*stop, "--iterations-to-skip", "7", "9"]
    assert nan_flags(["--rerun-mode", "validate_results"], {}) == []
    assert nan_flags(["--iterations-to-skip", "3"], {7: 2}) == stop
    with pytest.raises(UserError, match="it is the weights"):
        nan_flags([], dict.fromkeys(range(4), 2))
    assert noted_iterations(None) == noted_iterations(str(tmp_path)) == {}
    file = tmp_path / "rejected_iterations.json"
    file.write_text('{"7": 2}')
    assert noted_iterations(str(tmp_path)) == {7: 2}
    file.write_text('{"x": 2}')
    with pytest.raises(UserError, match=r"^save "):
        noted_iterations(str(tmp_path))


def test_other_documents_have_another_record(tmp_path: Path) -> None:
    from megatron_eagle.data.answers import AnswerDocuments
    from megatron_eagle.data.documents import FittedDocuments
    from tests.helpers.random_answers import write_answers

    file = tmp_path / "answers.jsonl"
    write_answers(file, 12)
    lines = file.read_text().splitlines(keepends=True)

    def record(content: list[str]) -> dict[str, Any]:
        file.write_text("".join(content))
        return document_record(FittedDocuments(AnswerDocuments(str(file), 61), 64))

    whole = record(lines)
    assert record(lines) == whole
    assert record(lines[:-1]) != whole
    assert record(lines[1:] + lines[:1]) != whole


def test_other_data_of_the_same_size_have_another_record(tmp_path: Path) -> None:
    prefix, content = tmp_path / "d", bytearray(1 << 21)
    for size in (len(content), 5000, 0):
        (tmp_path / "d.bin").write_bytes(content[:size])
        whole = indexed_record([str(prefix)])
        assert indexed_record([str(prefix)]) == whole
        changed = bytearray(content[:size])
        changed[size // 3 :] = b"x" * (size - size // 3)
        (tmp_path / "d.bin").write_bytes(changed)
        assert (indexed_record([str(prefix)]) != whole) == bool(size)
