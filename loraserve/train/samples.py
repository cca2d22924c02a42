"""A few answers of the base and of the adapter side by side, for the card. Greedy, without a cache: they are short."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from loraserve.base.attention import PackedAttention
from loraserve.base.load import Base
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack
from loraserve.train.dialogue import Dialogue

MAX_DIALOGUES = 1000
MAX_PROMPT_TOKENS = 256
MAX_NEW_TOKENS = 48
MAX_SECONDS = 30.0


@dataclass(frozen=True)
class Comparison:
    question: str
    before: str
    after: str


@torch.inference_mode()
def compare(
    base: Base, weights: Mapping[str, LoraWeight], dialogues: Iterable[Dialogue], count: int
) -> list[Comparison]:
    """Answer the first question of up to `count` different dialogues, with the base and with the adapter.

    Long prompts are passed over, and a thousand dialogues looked at; after 30 seconds the answers end where they are.
    """
    prompts: dict[str, list[int]] = {}
    for dialogue in islice(dialogues, MAX_DIALOGUES):
        first = next(i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant")
        question = dialogue.messages[first - 1]["content"] if first else ""
        if not question or question in prompts:
            continue
        ids = base.tokenizer.encode(base.template.render(dialogue.messages[:first], tools=dialogue.tools))
        if len(ids) <= MAX_PROMPT_TOKENS:
            prompts[question] = ids
        if len(prompts) == count:
            break
    if not prompts:
        return []
    sequences = [list(ids) for ids in prompts.values() for _ in range(2)]  # base, adapter, base, adapter, ...
    starts = [len(sequence) for sequence in sequences]
    _continue(base, weights, sequences)
    texts = [base.tokenizer.decode(s[start:]).strip() for s, start in zip(sequences, starts, strict=True)]
    return [Comparison(q, *pair) for q, *pair in zip(prompts, texts[::2], texts[1::2], strict=True)]


def _continue(base: Base, weights: Mapping[str, LoraWeight], sequences: list[list[int]]) -> None:
    """Extend `sequences` in place; those at odd places use the adapter."""
    stack = AdapterStack([weights])
    running = list(range(len(sequences)))
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_NEW_TOKENS):
        if not running or time.monotonic() > deadline:
            break
        lengths = [len(sequences[i]) for i in running]
        segments = [(length, [(0, 1.0)] if i % 2 else []) for i, length in zip(running, lengths, strict=True)]
        attention = PackedAttention(lengths, base.device)
        input_ids = torch.tensor([token for i in running for token in sequences[i]], device=base.device)
        last = torch.tensor(lengths, device=base.device).cumsum(0) - 1
        lora = LoraBatch.from_segments(stack, segments, base.device)
        logits = base.model(input_ids, attention.positions, attention, lora, rows=last)
        chosen = logits.argmax(dim=-1).tolist()
        for i, token in zip(running, chosen, strict=True):
            if token not in base.eos_ids:
                sequences[i].append(token)
        running = [i for i, token in zip(running, chosen, strict=True) if token not in base.eos_ids]
