"""A teacher of one rank whose distributions are given."""

from __future__ import annotations

from torch import Tensor

from megatron_eagle.loss.statistics import TeacherStats


class GivenTeacher:
    """The base's distribution, of which the draft has the first ``size`` ids."""

    def __init__(self, whole: Tensor, size: int) -> None:
        self.whole, self.size = whole, size
        self.full_columns, self.draft_columns = whole.shape[1], size

    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        whole = self.whole[chunk]
        inside, sums = whole[:, : self.size], whole[:, : self.size].sum(-1)
        top = whole.max(-1)
        stats = TeacherStats(
            inside.max(-1).values.log(), sums / inside.max(-1).values, top.values.log(),
            top.indices.float(), 1 / top.values,
        )  # fmt: skip
        return inside / sums.unsqueeze(-1), stats
