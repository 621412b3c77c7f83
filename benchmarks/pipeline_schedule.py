"""How busy the pipeline stages are: a discrete-event simulation of the schedule that training runs.

    python benchmarks/pipeline_schedule.py --output docs/benchmarks

The order of each stage's work is `megatron_eagle/pipeline/plan.py`'s, which training executes;
durations are floating-point operations (attention's included) at one rate, messages take their
bytes at one bandwidth. All stages wait for each other where an iteration ends, and the optimizer's
own time counts for nothing. Compared with the plan in which the last stage alone trains the draft.
Writes `pipeline_schedule.md`, and `pipeline_schedule.png` if matplotlib is there.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.pipeline.plan import Action, owner_of, stage_actions

RATE, BANDWIDTH, LATENCY = 400e12, 40e9, 20e-6
"""FLOP/s of a stage, bytes/s and seconds of a message."""
HIDDEN_AHEAD = 3
"""A stage waits with hidden state m until the next one has begun m - 3: it posts one receive ahead,
and two messages may be under way."""


@dataclass(frozen=True)
class Shape:
    """A base (Llama-like), its draft (one layer, draft vocabulary) and the micro-batch of one
    sequence."""

    name: str
    layers: int
    hidden: int
    ffn: int
    key_value: int
    vocabulary: int = 128256
    draft_vocabulary: int = 32000
    length: int = 4096

    def _layer(self, width: int) -> float:
        """FLOPs of one layer's forward for one token, its attention over half the sequence."""
        h = self.hidden
        weights = width * (h + 2 * self.key_value) + h * h + 3 * h * self.ffn
        return 2 * weights + 4 * h * self.length / 2

    @property
    def base(self) -> float:
        """Seconds of the whole base's forward for a micro-batch."""
        return self.layers * self._layer(self.hidden) * self.length / RATE

    def draft(self, steps: int) -> float:
        """Seconds of a draft step: teacher, K unrolled steps forward and backward."""
        h = self.hidden
        step = self._layer(2 * h) + 2 * h * self.draft_vocabulary
        teacher = 2 * h * (self.vocabulary + self.draft_vocabulary)
        projection = 2 * 3 * h * h
        return (teacher + 2 * projection + 3 * steps * step) * self.length / RATE

    def message(self, hidden_states: int) -> float:
        """Seconds until that many [S, H] in bf16 have arrived."""
        return LATENCY + 2 * self.hidden * self.length * hidden_states / BANDWIDTH


SHAPES = [Shape("8B", 32, 4096, 14336, 1024), Shape("70B", 80, 8192, 28672, 1024)]


def last_stage_plan(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Return the plan compared with: the last stage trains on every micro-batch."""
    actions = []
    for m in range(micro_batches):
        actions.append(Action("base", m))
        if stage == stages - 1:
            actions.append(Action("draft", m))
    return actions


Plan = list[list[Action]]
"""What each stage does in one iteration."""


def simulate(
    shape: Shape, iterations: list[Plan], steps: int, owner_everywhere: bool
) -> list[float]:
    """When each iteration ends, in seconds: every stage works through its plan in order, and waits
    for what an action needs; the optimizer step waits for all stages."""
    stages = len(iterations[0])
    run = _Run(shape, shape.base / stages, shape.draft(steps), owner_everywhere, stages)
    ends, before = [], 0
    for plan in iterations:
        run.work_through(plan, before)
        run.clock = [max(run.clock)] * stages
        ends.append(run.clock[0])
        before += 1 + max(a.micro_batch for a in plan[-1] if a.kind == "base")
    return ends


@dataclass
class _Run:
    """The state of a simulation. Base forwards are known by the micro-batch's number since the
    start of training, of which earlier iterations had ``before``."""

    shape: Shape
    base: float
    draft: float
    owner_everywhere: bool
    stages: int

    def __post_init__(self) -> None:
        self.clock = [0.0] * self.stages
        self.began: dict[tuple[int, int], float] = {}
        self.ended: dict[tuple[int, int], float] = {}

    def work_through(self, plan: Plan, before: int) -> None:
        count = 1 + max(action.micro_batch for action in plan[-1])
        left = [deque(actions) for actions in plan]
        while any(left):
            moved = False
            for stage, actions in enumerate(left):
                while actions:
                    kind, m = actions[0]
                    number = before + m + (count if kind == "ahead" else 0)
                    at = self._ready(stage, kind, number, owner_of(m, self.stages))
                    if at is None:
                        break
                    actions.popleft()
                    self._do(stage, kind, number, at)
                    moved = True
            assert moved, "the schedule is stuck"

    def _ready(self, stage: int, kind: str, number: int, owner: int) -> float | None:
        """When what the action needs is there; None if that is not known yet."""
        last = self.stages - 1
        if kind == "draft":
            done = self.ended.get((last, number))
            remote = self.owner_everywhere and owner != last
            return None if done is None else done + (self.shape.message(3) if remote else 0.0)
        needs = [0.0]
        if stage > 0:
            before = self.ended.get((stage - 1, number))
            needs.append(-1.0 if before is None else before + self.shape.message(1))
        if stage < last and number >= HIDDEN_AHEAD:
            needs.append(self.began.get((stage + 1, number - HIDDEN_AHEAD), -1.0))
        return None if -1.0 in needs else max(needs)

    def _do(self, stage: int, kind: str, number: int, at: float) -> None:
        began = max(self.clock[stage], at)
        self.clock[stage] = began + (self.draft if kind == "draft" else self.base)
        if kind != "draft":
            self.began[stage, number], self.ended[stage, number] = began, self.clock[stage]


@dataclass(frozen=True)
class Row:
    """One configuration; shares of the ideal, which is all work spread evenly without a wait."""

    shape: str
    steps: int
    stages: int
    micro_batches: int
    every_stage: float
    first: float
    last_stage: float

    @property
    def speedup(self) -> float:
        return self.every_stage / self.last_stage


def measure(shape: Shape, steps: int, stages: int, micro_batches: int) -> Row:
    """Simulate an iteration in the middle of training, and the first, which fills the pipeline."""
    ideal = micro_batches * (shape.base + shape.draft(steps)) / stages
    ours = [
        [
            stage_actions(s, stages, micro_batches, was_ahead=was_ahead, runs_ahead=True)
            for s in range(stages)
        ]
        for was_ahead in (False, True, True)
    ]
    last = [[last_stage_plan(s, stages, micro_batches) for s in range(stages)]]
    first, second, third = simulate(shape, ours, steps, True)
    return Row(
        shape.name, steps, stages, micro_batches,
        ideal / (third - second), ideal / first, ideal / simulate(shape, last, steps, False)[0],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    parser.add_argument("--micro-batches-per-stage", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    rows = [
        measure(shape, steps, stages, per_stage * stages)
        for shape in SHAPES
        for steps in (3, 7)
        for stages in (4, 8, 16)
        for per_stage in args.micro_batches_per_stage
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    print(text)
    (args.output / "pipeline_schedule.md").write_text(text + "\n", encoding="utf-8")
    plot(rows, args.output / "pipeline_schedule.png")


def table(rows: list[Row]) -> str:
    lines = [
        "# Pipeline schedule, simulated",
        "",
        "`python benchmarks/pipeline_schedule.py`. Share of the ideal (all work spread evenly over",
        "the stages, no wait); iteration of M micro-batches, one sequence of 4,096 tokens each.",
        "The first iteration fills the pipeline. Each begins the next, whose base forwards need no",
        "optimizer step, so all others have no fill; the last stage's plan fills it every time.",
        "The optimizer's own time is left out.",
        "",
        "| base | TTT steps | PP | M | every stage trains | its first iteration "
        "| last stage trains | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.shape} | {row.steps} | {row.stages} | {row.micro_batches} | "
            f"{row.every_stage:.1%} | {row.first:.1%} | {row.last_stage:.1%} | "
            f"{row.speedup:.2f} |"
        )
    lines += ["", "![share of the ideal](pipeline_schedule.png)"]
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, shape in zip(panels, SHAPES, strict=True):
        for steps, marker in ((3, "o"), (7, "s")):
            chosen = [
                r for r in rows
                if (r.shape, r.steps) == (shape.name, steps) and r.micro_batches == 4 * r.stages
            ]  # fmt: skip
            stages = [str(r.stages) for r in chosen]
            for name, color in (("every_stage", "tab:blue"), ("last_stage", "tab:red")):
                label = f"{name.replace('_', ' ')} trains, K = {steps}"
                values = [100 * getattr(r, name) for r in chosen]
                axes.plot(stages, values, marker=marker, color=color, label=label,
                          linestyle="-" if steps == 3 else "--")  # fmt: skip
        axes.set(title=f"{shape.name} base, M = 4 PP", xlabel="pipeline stages", ylim=(0, 100))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% of ideal")
    panels[1].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
