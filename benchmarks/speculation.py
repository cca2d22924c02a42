"""What drafts bring a single client: tokens per second with and without them, on the bundled base.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py

Questions of examples/base/eval in three settings: `chat`, asked at once; `long`, after five other questions with their
answers; `again`, asked a second time, where the answer stands in the conversation. With and without drafts take turns,
prompt by prompt, in one process. Columns: tokens per second without and with drafts, of whole answers with their
prompts, medians over the rounds; the gain by the clock and in processor time, which others on the machine disturb less;
drafts per token, and the share of them that held; tokens per step, the prompts' included; whether both gave the same
tokens. The last line of stdout is JSON.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from loraserve import LLM, SamplingParams
from loraserve.bench.machine import machine

ROOT = Path(__file__).parents[1]
DRAFTS = (0, 3)
MAX_TOKENS = 64


def prompts(llm: LLM) -> dict[str, list[list[int]]]:
    """Token ids by setting."""
    with (ROOT / "examples/base/eval/answers.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines][:60]
    base = llm.service.base
    turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}] for r in rows]
    settings: dict[str, list[list[int]]] = {"chat": [], "long": [], "again": []}
    for i in range(0, len(turns), 6):
        *before, (question, answer) = turns[i : i + 6]
        for setting, messages in (
            ("chat", [question]),
            ("long", [*itertools.chain(*before), question]),
            ("again", [question, answer, question]),
        ):
            settings[setting].append(base.tokenizer.encode(base.template.render(messages)))
    return settings


def measure(
    llms: dict[int, LLM], own: list[list[int]], adapter: str, temperature: float, rounds: int
) -> dict[str, Any]:
    """Tokens per second without drafts and with them, how often there was one, held, and what steps brought."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=7)
    seconds: dict[int, list[list[float]]] = {drafts: [] for drafts in llms}  # per round, by the wall and the processor
    tokens: dict[int, list[int]] = {}
    off, on = DRAFTS
    before = llms[on].service.stats()
    for i in range(rounds):
        for drafts in llms:
            seconds[drafts].append([0.0, 0.0])
            tokens[drafts] = []
        for prompt in own:
            for drafts, llm in sorted(llms.items(), reverse=bool(i % 2)):
                start = time.perf_counter(), time.process_time()
                tokens[drafts] += llm.generate([prompt], adapter, params)[0].token_ids
                seconds[drafts][-1][0] += time.perf_counter() - start[0]
                seconds[drafts][-1][1] += time.process_time() - start[1]
    ran = {name: value - before[name] for name, value in llms[on].service.stats().items() if name.endswith("_total")}
    wall, cpu = ({drafts: [pair[i] for pair in pairs] for drafts, pairs in seconds.items()} for i in (0, 1))
    return {
        "off_tokens_per_s": round(len(tokens[off]) / statistics.median(wall[off])),
        "on_tokens_per_s": round(len(tokens[on]) / statistics.median(wall[on])),
        "gain": round(statistics.median(a / b for a, b in zip(wall[off], wall[on], strict=True)), 2),
        "cpu_gain": round(statistics.median(a / b for a, b in zip(cpu[off], cpu[on], strict=True)), 2),
        "drafted_per_token": round(ran["drafted_tokens_total"] / ran["generated_tokens_total"], 2),
        "accepted": round(ran["accepted_tokens_total"] / max(ran["drafted_tokens_total"], 1), 2),
        "tokens_per_step": round(ran["generated_tokens_total"] / ran["steps_total"], 2),
        "same_tokens": tokens[off] == tokens[on],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    llms = {
        drafts: LLM(adapters_dir=ROOT / "adapters", device="cpu", dtype=args.dtype, prefix_memory=0, speculate=drafts)
        for drafts in DRAFTS
    }
    result = {}
    columns = "setting", "adapter", "temperature", "without", "with", "gain", "cpu", "drafted", "held", "a step", "same"
    print("|", " | ".join(columns), "|")
    print("|" + " --- |" * len(columns))
    for setting, own in prompts(llms[0]).items():
        for adapter in ("base", "pirate"):
            for temperature in (0.0, 0.7):
                measure(llms, own, adapter, temperature, 1)
                row = measure(llms, own, adapter, temperature, args.rounds)
                result[f"{setting}/{adapter}/{temperature}"] = row
                print("|", " | ".join(map(str, (setting, adapter, temperature, *row.values()))), "|", flush=True)
    print(json.dumps({"machine": machine(), "dtype": args.dtype, "results": result}))
    for llm in llms.values():
        llm.close()


if __name__ == "__main__":
    main()
