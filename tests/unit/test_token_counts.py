"""Token counts for the draft vocabulary: the training split, blend weights, bounded reading."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.helpers.corpus import write_indexed


def args(words: list[str], split: str | None = None) -> Namespace:
    return Namespace(
        data_path=words, data_args_path=None, train_data_path=None, valid_data_path=None,
        test_data_path=None, per_split_data_args_path=None, split=split, mock_data=False,
        data_cache_path=None,
    )  # fmt: skip


def counts(words: list[str], split: str | None = None, vocab_size: int = 8) -> list[float]:
    from megatron_eagle.training.token_counts import TrainingBlend, count_tokens

    found = count_tokens(TrainingBlend.of(args(words, split)), vocab_size).double()
    return (found / found.sum()).tolist()


def test_the_weights_of_a_blend_count(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", [[1, 1, 2, 2]] * 10)
    write_indexed(tmp_path / "b", [[3] * 4] * 30)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert counts(["0.8", a, "0.2", b])[1:4] == pytest.approx([0.4, 0.4, 0.2])
    assert counts([a, b])[1:4] == pytest.approx([0.125, 0.125, 0.75])


def test_only_the_training_split_counts(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", [[1, 2]] * 9 + [[5, 5]])
    assert counts([str(tmp_path / "a")], "90,10,0")[5] == 0
    assert counts([str(tmp_path / "a")], "100,0,0")[5] == pytest.approx(0.1)


def test_a_large_data_set_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_eagle.training import token_counts

    write_indexed(tmp_path / "a", [[1] * 4, [2] * 4] * 10)
    monkeypatch.setattr(token_counts, "TOKENS_PER_DATA_SET", 40)
    assert counts([str(tmp_path / "a")])[1] == 1.0, "every second document"


def test_ids_beyond_the_vocabulary_name_the_data(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", [[1, 8]])
    with pytest.raises(ValueError, match=r"--data-path .*a: token id 8 is outside"):
        counts([str(tmp_path / "a")])
