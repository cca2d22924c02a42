"""What 8-bit weights cost in accuracy: the bundled base and its adapters in int8 beside float32 and bfloat16.

    python benchmarks/int8_accuracy.py

Texts are the questions of examples/base/eval with the base's recorded answers, read by every model; the last line of
stdout is JSON: mean KL divergence from float32 in nats per token, how often the likeliest next token is the same, and
perplexity of the answers.
"""

import json
from pathlib import Path
from typing import Any

import torch

from loraserve import LLM

ROOT = Path(__file__).parents[1]
ADAPTERS = (None, "pirate", "poet", "lumi")


def read(texts: list[list[dict[str, str]]], dtype: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per text and adapter, log-probabilities (T - 1, vocab) of the next token and the tokens that came (T - 1,)."""
    found = []
    with LLM(adapters_dir=ROOT / "adapters", device="cpu", dtype=dtype) as llm:
        base = llm.service.base
        for messages in texts:
            ids = base.tokenizer.encode(base.template.render(messages, add_generation_prompt=False))
            for adapter in ADAPTERS:
                logits = llm.logits(ids, adapter)[:-1]
                found.append((logits.log_softmax(dim=-1), torch.tensor(ids[1:])))
    return found


def main() -> None:
    with (ROOT / "examples/base/eval/answers.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines][:60]
    texts = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    exact = read(texts, "float32")
    result: dict[str, Any] = {"texts": len(texts), "tokens": sum(len(tokens) for _, tokens in exact)}
    for dtype in ("float32", "bfloat16", "int8"):
        divergence, same, surprise = 0.0, 0, 0.0
        for (wanted, tokens), (got, _) in zip(exact, read(texts, dtype), strict=True):
            divergence += (wanted.exp() * (wanted - got)).sum().item()
            same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
            surprise -= got.gather(1, tokens.unsqueeze(1)).sum().item()
        result[dtype] = {
            "kl_nats": round(divergence / result["tokens"], 6),
            "same_next_token": round(same / result["tokens"], 4),
            "perplexity": round(torch.tensor(surprise / result["tokens"]).exp().item(), 3),
        }
        print(f"{dtype:10} {result[dtype]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
