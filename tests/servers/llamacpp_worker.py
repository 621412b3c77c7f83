"""Runs in llama.cpp's environment: converts base and drafts, and asks llama.cpp's own server.

    python llamacpp_worker.py JOBS.json RESULTS.json

A job is {"base": DIR, "draft": DIR, "card": commands of the model card's paragraph on llama.cpp,
"prompts": [ids], "max_tokens": N, "draft_tokens": N, "stop_ids": [id],
"unused_id": id that no answer has}; its result
{"plain": [ids], "answers": [ids], "verifications": N, "accepted": [N]}, or {"error": text}. The
server is llama.cpp's, in this process and on loopback, with the settings of the card's command, in
fp32. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from jobs import work

CONVERTER = Path(sys.prefix) / "llama.cpp"
BASES: dict[Path, tuple[Path, list[list[int]]]] = {}
"""Base -> the folder of the first draft beside it, and its own greedy answers."""


def with_readable_tokenizer(base: Path, folder: Path, unused: int) -> None:
    """Make a copy of the base, by links, with a tokenizer in the form that the converter knows.

    Prompts and answers are ids, so its words are any. An ``unused`` token ends answers: of a chain
    over an end token llama.cpp counts less than other servers, and the end tokens are ours to see.
    """
    folder.mkdir()
    for file in base.iterdir():
        if "token" not in file.name and file.name not in ("config.json", "generation_config.json"):
            (folder / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": unused}))
    # Not bytes: half a character would be held back, and with it the token in the stream.
    names = {i: f"token{i}" for i in range(config["vocab_size"])} | {10: "<0x0A>"}
    vocabulary = {name: i for i, name in names.items()}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder})
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def converted(base: Path, draft: str, folder: Path, commands: list[str]) -> None:
    """Run the card's commands of the converter in ``folder``, weights kept in fp32. A base that an
    earlier draft had is linked."""
    for command in commands:
        if "DRAFT" not in command and base in BASES:
            (folder / "base.gguf").symlink_to(BASES[base][0] / "base.gguf")
            continue
        words = [sys.executable, str(CONVERTER / "convert_hf_to_gguf.py"), *command.split()[2:]]
        places = {"BASE": str(base), "DRAFT": draft}
        words = [places.get(word, word) for word in words] + ["--outtype", "f32"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def start(folder: Path, options: dict[str, str] | None) -> Any:
    """Start the server on a free port of loopback; ``options``: of the card's command, for the
    draft, or None for the base alone."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = str(folder / "base.gguf")
    params.n_ctx, params.n_parallel = 256, 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if options:
        types = {"draft-eagle3": llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3}
        params.speculative.types = [types[options["--spec-type"]]]
        draft = params.speculative.draft
        draft.mparams.path = str(folder / options["-md"])
        draft.n_max, draft.p_min = (
            int(options["--spec-draft-n-max"]),
            float(options["--spec-draft-p-min"]),
        )
        draft.cache_type_k = draft.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    return llama.Server(params)


def answer(address: str, ids: list[int], job: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The answer to a prompt, up to its end token, and the accepted drafts of each verification.

    llama.cpp does not draft beyond the token limit. So it is asked for so many tokens more, and
    left when the answer is whole: its counters come with every token.
    """
    request = {
        "prompt": ids,
        "n_predict": job["max_tokens"] + job["draft_tokens"],
        "temperature": 0,
        "stream": True,
        "return_tokens": True,
        "timings_per_token": True,
        "cache_prompt": False,
    }
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{address}/completion", json.dumps(request).encode(), headers)
    tokens: list[int] = []
    accepted: list[int] = []
    drafted = 0
    with urllib.request.urlopen(call, timeout=120) as events:
        for line in events:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            counters = event.get("timings", {})
            if counters.get("draft_n", 0) > drafted:
                assert counters["draft_n"] == drafted + job["draft_tokens"], "a chain was cut"
                drafted = counters["draft_n"]
                accepted.append(counters["draft_n_accepted"] - sum(accepted))
            tokens += event["tokens"]
            if len(tokens) >= job["max_tokens"] or set(event["tokens"]) & set(job["stop_ids"]):
                break
    return tokens, accepted


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = Path(job["base"]).parent.name
    base = folder.with_name(f"base_{name}")
    if not base.exists():
        with_readable_tokenizer(Path(job["base"]), base, job["unused_id"])
    *commands, serve = job["card"]
    converted(base, job["draft"], folder, commands)
    words = serve.split()[1:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    if base not in BASES:
        server = start(folder, None)
        plain = [answer(server.listening_address, ids, job)[0] for ids in job["prompts"]]
        BASES[base] = folder, plain
        del server
    server = start(folder, options)
    answers, chains = [], []
    for ids in job["prompts"]:
        tokens, accepted = answer(server.listening_address, ids, job)
        answers.append(tokens)
        chains += accepted
    del server
    per_position = [sum(a > place for a in chains) for place in range(job["draft_tokens"])]
    return {
        "plain": BASES[base][1],
        "answers": answers,
        "verifications": len(chains),
        "accepted": per_position,
    }


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CONVERTER / "gguf-py")}
    return work(run)


if __name__ == "__main__":
    sys.exit(main())
