"""A few answers of the base and an adapter, or of two adapters, side by side: greedy, all of them in each step.

They come from the model as it trains, over a cache of their own: no second copy of its weights is made for them.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from loraserve.base.load import Base
from loraserve.engine.kv_cache import CachedAttention, KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack
from loraserve.train.dialogue import Dialogue

Sides = tuple[Mapping[str, LoraWeight] | None, Mapping[str, LoraWeight] | None]

MAX_DIALOGUES = 1000
MAX_PROMPT_TOKENS = 256
MAX_NEW_TOKENS = 48
MAX_SECONDS = 30.0
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Comparison:
    question: str
    before: str
    after: str


@torch.inference_mode()
def compare(base: Base, sides: Sides, dialogues: Iterable[Dialogue], count: int) -> list[Comparison]:
    """Answer the first question of up to `count` different dialogues, by each of two sides.

    Args:
        sides: whose answers are `before` and `after`: an adapter's weights on the base's device, or None for the base.

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
    pairs = [(ids, side) for ids in prompts.values() for side in range(2)]
    answers = [base.tokenizer.decode(ids).strip() for ids in _answers(base, sides, pairs)]
    return [Comparison(q, *pair) for q, *pair in zip(prompts, answers[::2], answers[1::2], strict=True)]


def _answers(base: Base, sides: Sides, prompts: list[tuple[list[int], int]]) -> list[list[int]]:
    """The token ids that follow each prompt, given with the number of the side that answers."""
    detached = [{target: weight.map(torch.detach) for target, weight in (side or {}).items()} for side in sides]
    stack = AdapterStack(detached)
    all_of = [
        Sequence(ids, GREEDY, MAX_NEW_TOKENS, stop_ids=base.eos_ids, slot=i) for i, (ids, _) in enumerate(prompts)
    ]
    longest = max(len(ids) for ids, _ in prompts) + MAX_NEW_TOKENS
    cache = KVCache(base.config, len(all_of), longest, base.device, base.dtype)
    running, deadline = all_of, time.monotonic() + MAX_SECONDS
    while running and time.monotonic() < deadline:
        chunks = [Chunk(s, s.num_computed, s.num_tokens - s.num_computed) for s in running]
        sizes, of = [chunk.count for chunk in chunks], [prompts[s.slot][1] for s in running]
        segments = [(n, [(side, 1.0)] if sides[side] else []) for n, side in zip(sizes, of, strict=True)]
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.start + chunk.count)]
        where = torch.tensor(positions, device=base.device)
        attention = CachedAttention(cache, chunks, where)
        lora = LoraBatch.from_segments(stack, segments, base.device)
        last = torch.tensor(sizes).cumsum(0) - 1
        logits = base.model(torch.tensor(ids, device=base.device), where, attention, lora, rows=last)
        left = []
        for sequence, token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
            sequence.num_computed = sequence.num_tokens
            if sequence.append(token) is None:
                left.append(sequence)
        running = left
    return [[token for token in s.output_token_ids if token not in base.eos_ids] for s in all_of]
