"""What SGLang counts of a request, by its own lines, and what `make serve` makes of it.

The scheduler's methods that take a verification and that end a request, and the one that writes the
figures into the answer, are run on requests whose chains pass a stop token and the token limit.
"""

from __future__ import annotations

import ast
import os
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.serving.engine import Draft, Setting
from benchmarks.serving.sglang_engine import Sglang
from tests.readers.server_classes import method_source

WHEELS = Path(os.environ.get("READERS_WHEELS", "absent"))
SGLANG = WHEELS / "sglang" / "sglang" / "srt"
if not SGLANG.is_dir():
    pytest.skip("run by `make test-readers`", allow_module_level=True)
DRAFTED, STOP, LIMIT = 3, 99, 10


def own(folder: Path, name: str, *methods: str, **names: Any) -> type:
    """A class of these methods of SGLang's class ``name``, which see ``names``."""
    sources = [method_source(folder, name, method) for method in methods]
    assert None not in sources
    text = "from __future__ import annotations\n" + "\n".join(map(str, sources))
    exec(text, names)
    return type(name, (SimpleNamespace,), {method: names[method] for method in methods})


def ending(kind: str) -> Any:
    return lambda **about: SimpleNamespace(kind=kind, **about)


Request = own(
    SGLANG / "managers",
    "Req",
    *("update_spec_correct_drafts_histogram", "update_finish_state", "_check_token_based_finish"),
    *("_cap_finished_len_at_max_new_tokens",),
    FINISH_MATCHED_TOKEN=ending("stop"),
    FINISH_LENGTH=ending("length"),
)
Processor = own(
    SGLANG / "managers" / "scheduler_components",
    "SchedulerBatchResultProcessor",
    "_resolve_spec_v2_tokens",
    _get_speculative_output_stride=lambda result: DRAFTED + 1,
)
Tokenizer = own(
    SGLANG / "managers",
    "TokenizerManager",
    "_calculate_spec_decoding_metrics",
    get_spec=lambda: SimpleNamespace(speculative_num_draft_tokens=DRAFTED + 1),
    _ragged_verify_cap_accept=lambda: False,
)


def request() -> Any:
    sampling = SimpleNamespace(ignore_eos=False, stop_token_ids={STOP}, max_new_tokens=LIMIT)
    made = Request(
        sampling_params=sampling, eos_token_ids=None, tokenizer=None, grammar=None, to_finish=None,
        finished_reason=None, finished_len=None, is_retracted=False, output_ids=array("q", [1]),
        kv=SimpleNamespace(kv_committed_len=5), spec_verify_ct=0, spec_num_correct_drafts=0,
        spec_correct_drafts_histogram=[],
    )  # fmt: skip
    made.finished = lambda: made.finished_reason is not None
    made._check_vocab_boundary_finish = lambda tokens: False
    made._check_str_based_finish = lambda count: False
    return made


def verify(req: Any, tokens: list[int]) -> None:
    """One verification that accepted all but the last of ``tokens``, as the scheduler takes it."""
    nothing = SimpleNamespace(
        snapshot_spec_decode_metrics=lambda *_: None, on_verify_complete_cpu=lambda *_, **__: None
    )
    processor = Processor(
        metrics_reporter=nothing, model_worker=nothing, advance_grammar_fsm=lambda *_: None
    )
    padded = tokens + [0] * (DRAFTED + 1 - len(tokens))
    result = SimpleNamespace(
        next_token_ids=torch.tensor(padded), accept_lens=torch.tensor([len(tokens)]),
        num_non_draft_tokens_per_req=1, block_accept_lens=None, cap_lens=None,
    )  # fmt: skip
    (emitted,) = processor._resolve_spec_v2_tokens(result, SimpleNamespace(reqs=[req]))
    if not req.finished():
        req.output_ids.extend(emitted)
        req.update_finish_state(len(emitted))


def answered(chains: list[list[int]]) -> dict[str, Any]:
    """SGLang's answer to a request with these verifications."""
    req = request()
    for tokens in chains:
        verify(req, tokens)
    assert req.finished()
    ids = list(req.output_ids[: req.finished_len])
    names = ("spec_verify_ct", "spec_num_correct_drafts", "spec_correct_drafts_histogram")
    sent = {name: [getattr(req, name)] for name in names}
    about: dict[str, Any] = {}
    received = SimpleNamespace(**sent, completion_tokens=[len(ids)])
    Tokenizer()._calculate_spec_decoding_metrics(about, received, 0)
    return {"output_ids": ids, "meta_info": about}


@pytest.mark.parametrize(
    ("chains", "length", "counts"),
    [
        # A stop token in the middle of the last chain, whose three drafts all count.
        ([[2, 3], [4], [5, STOP, 6, 7]], 6, (3, 2, 1, 1)),
        # The last chain passes the limit of 10 tokens: it counts in full.
        ([[2, 3, 4, 5], [6, 7, 8], [9, 10, 11]], 10, (3, 3, 3, 1)),
        # What the overlapped scheduler verified after the end counts nothing.
        ([[2], [STOP], [3, 4, 5, 6]], 3, (2, 0, 0, 0)),
    ],
)
def test_whole_chains_count(chains: list[list[int]], length: int, counts: tuple[int, ...]) -> None:
    draft = Draft(Path("draft"), "eagle3", DRAFTED)
    engine = Sglang(Setting(Path("python"), Path("base"), draft, "cuda", "float32", 8))
    answer = engine.answer(answered(chains))
    assert len(answer.ids) == length
    assert tuple(answer.counts.values()) == counts
    assert list(answer.counts) == ["verifications", "accepted_0", "accepted_1", "accepted_2"]


def test_sglang_has_the_flags_that_it_is_given() -> None:
    draft = Draft(Path("draft"), "eagle3", DRAFTED)
    setting = Setting(Path("python"), Path("base"), draft, "cuda", "float32", 8)
    given = {word for word in Sglang(setting).command(5) if word.startswith("--")}
    fields = {
        node.target.id
        for file in (SGLANG / "arg_groups" / "fields").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {flag.removeprefix("--").replace("-", "_") for flag in given} <= fields
