"""--eagle-eval-prompts: the draft's accepted length in training, at an interval and at the end.

Base and draft are decoded with as they lie in memory, in the layout that trains. Nothing that
training reads is touched: no random number is drawn, no gradient kept, and the next iteration is
the one it would have been.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_wandb_writer,
    print_rank_last,
)

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.compat import patch, require, unwrap_model
from megatron_eagle.config import EagleConfig
from megatron_eagle.decode.acceptance import AcceptanceReport, check_lengths, evaluate_acceptance
from megatron_eagle.decode.prompt_shards import PromptShard, lockstep_groups
from megatron_eagle.decode.prompts import digest, read_prompt_ids, stop_ids
from megatron_eagle.model import EagleGPTModel
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.training.best_checkpoint import BestCheckpoint
from megatron_eagle.training.metrics_log import MetricsLog

_TRAINER = "megatron.training.training"
_AFTER_STEP = f"{_TRAINER}:post_training_step_callbacks"
HF_TOKENIZER = "HuggingFaceTokenizer"


class AcceptanceEvaluation:
    """Measures the draft after the iterations that the options name, logs it, and keeps the best.

    Raises ``ValueError`` for prompts that cannot be read or continued, and a best draft in
    ``--save`` that was measured otherwise.
    """

    def __init__(
        self, args: Any, options: EagleConfig, base: BaseInfo, log: MetricsLog | None
    ) -> None:
        assert options.train.eval_prompts is not None
        self.options, self.base, self.log = options, base, log
        tokenizer = args.tokenizer_model if args.tokenizer_type == HF_TOKENIZER else None
        self.prompts = read_prompt_ids(Path(options.train.eval_prompts), tokenizer, base.vocab_size)
        positions = base.megatron_args["max_position_embeddings"]
        check_lengths(self.prompts, options.train.eval_new_tokens, positions)
        self.settings: dict[str, Any] = {
            "base": base.fingerprint,
            "prompts_sha256": digest(self.prompts),
            "max_new_tokens": options.train.eval_new_tokens,
            "draft_tokens": options.train.eval_draft_tokens or options.steps,
        }
        self.best = None
        if args.save is not None:
            self.best = BestCheckpoint.open(Path(args.save) / "best", self.settings)
        self._shard: PromptShard | None = None

    def attach(self) -> None:
        """Attach to Megatron's trainer; call this before ``pretrain()``."""
        after_step = require(_AFTER_STEP)

        def called(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> Any:
            last = iteration == get_args().train_iters
            if last or iteration % self.options.train.eval_interval == 0:
                self._evaluate(model, optimizer, iteration)
            return after_step(model, optimizer, scheduler, iteration, *rest)

        patch(_AFTER_STEP, called, "measure the draft's accepted length at an interval")

    def _evaluate(self, model: list[Any], optimizer: Any, iteration: int) -> None:
        timers = get_timers()
        timers("interval-time").stop()
        eagle = unwrap_model(model[0])
        with gathered_parameters(model, optimizer):
            started = time.perf_counter()
            with nvtx_range("evaluation"):
                report = self._measure(eagle)
            seconds = time.perf_counter() - started
            figures = self._figures(report, iteration, eagle)
            improved = self.best is not None and self.best.offer(figures, eagle.sharded_state_dict)
        self._tell(report, iteration, seconds, improved)
        timers("interval-time", log_level=0).start(barrier=True)

    def _measure(self, eagle: EagleGPTModel) -> AcceptanceReport:
        if self._shard is None:
            groups = ProcessGroupCollection.use_mpu_process_groups()
            self._shard = PromptShard.of(lockstep_groups(groups))
        training = eagle.draft.training
        eagle.draft.eval()
        try:
            return evaluate_acceptance(
                eagle.base,
                eagle.draft,
                self.prompts,
                exchange=eagle.exchange,
                shard=self._shard,
                max_new_tokens=self.options.train.eval_new_tokens,
                draft_tokens=self.settings["draft_tokens"],
                stop_ids=stop_ids(self.base),
                compare=False,
            )
        finally:
            eagle.draft.train(training)

    def _figures(
        self, report: AcceptanceReport, iteration: int, eagle: EagleGPTModel
    ) -> dict[str, Any]:
        return {
            "iteration": iteration,
            "accepted_length": report.accepted_length,
            "acceptance": report.unconditional,
            "conditional_acceptance": report.conditional,
            "verifications": report.counts.verifications,
            "prompts": report.prompts,
            "tokens": report.tokens,
            "dtype": str(eagle.base.embedding_weight.dtype).removeprefix("torch."),
            **self.settings,
        }

    def _tell(
        self, report: AcceptanceReport, iteration: int, seconds: float, improved: bool
    ) -> None:
        rates = " ".join(f"{rate:.3f}" for rate in report.unconditional)
        text = (
            f" accepted length at iteration {iteration}: {report.accepted_length:.3f} "
            f"(drafts accepted per position {rates}; {report.prompts} prompts, "
            f"{report.tokens} tokens, {seconds:.1f} s)"
        )
        line = {
            "iteration": iteration,
            "eval_accepted_length": report.accepted_length,
            "eval_acceptance": report.unconditional,
            "eval_seconds": round(seconds, 3),
        }
        if self.best is not None:
            text += f", best {self.best.accepted_length:.3f} at {self.best.iteration}"
            text += f" -> {self.best.directory}" if improved else ""
            line |= {
                "best_accepted_length": self.best.accepted_length,
                "best_iteration": self.best.iteration,
            }
        print_rank_last(text)
        if self.log is not None:
            self.log.write(line)
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer is not None:
            writer.add_scalar("eval_accepted_length", report.accepted_length, iteration)
        if wandb is not None:
            wandb.log({"eval_accepted_length": report.accepted_length}, iteration)


@contextmanager
def gathered_parameters(model: list[Any], optimizer: Any) -> Iterator[None]:
    """Give every rank whole parameters inside: with ``--overlap-param-gather`` those of the last
    step are on their way until the modules' next forward, whose hooks expect training's order."""
    if not require(f"{_TRAINER}:should_disable_forward_pre_hook")(get_args()):
        yield
        return
    require(f"{_TRAINER}:disable_forward_pre_hook")(model, optimizer=optimizer)
    try:
        yield
    finally:
        require(f"{_TRAINER}:enable_forward_pre_hook")(model)
