"""Does a merged model answer as its base and adapters do?

The unmerged path, the one that serves, answers a few prompts greedily. Then both models read prompt and answer, and
their logits are compared at every position: the largest difference, and how often both choose the same next token.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from loraserve.base.attention import PackedAttention
from loraserve.base.load import Base
from loraserve.base.model import Model
from loraserve.engine.adapter_cache import serving_dtype
from loraserve.engine.engine import Engine
from loraserve.engine.kv_cache import KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.runner import Runner
from loraserve.engine.scheduler import Scheduler
from loraserve.engine.sequence import Sequence
from loraserve.engine.slots import Slots
from loraserve.errors import LoraserveError, NotFinite
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.dora import prepared
from loraserve.lora.stack import AdapterStack

PROMPTS = (
    "Who are you?",
    "What can you do for me?",
    "Tell me about the sea.",
    "Give me some advice for a rainy day.",
    "你是谁？",
    "你能做什么？",
    "给我讲讲月亮。",
    "今天心情不好，怎么办？",
)
MAX_TOKENS = 32
Weighted = List[tuple[Adapter, float]]
R = TypeVar("R")


@dataclass(frozen=True)
class Probe:
    """One prompt, the unmerged path's answer, and how the merged model differs on it."""

    prompt: str
    answer: str
    tokens: int
    same_greedy_tokens: int
    max_logit_difference: float


@dataclass(frozen=True)
class Parity:
    """How closely a merged model follows the unmerged path."""

    max_logit_difference: float
    max_logit: float
    """The largest logit of the unmerged path, to judge the difference by."""
    greedy_tokens: int
    greedy_agreement: float
    """Of `greedy_tokens` chosen by the unmerged path, the part that the merged model would choose too."""
    dtype: str
    device: str
    prompts: list[Probe]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _here(function: Callable[[], R]) -> R:
    return function()


def compare(
    base: Base,
    adapters: Weighted,
    merged: Model,
    prompts: List[str] = PROMPTS,
    run: Callable[[Callable[[], Any]], Any] = _here,
) -> Parity:
    """Compare a merged model with `base` plus `adapters`.

    Args:
        adapters: with the factor on each one's ΔW.
        merged: on the base's device and in its dtype.
        prompts: what a user says; rendered in the base's own template, if it has one.
        run: calls a function where the models may be used, and returns its result. Each call is one forward pass, so
            that a thread that serves requests can take them in between.

    Raises:
        NotFinite: logits of either are no longer numbers.
    """
    ready = [(prepared(adapter, base.weight_of), factor) for adapter, factor in adapters]
    active = tuple((adapter.to(base.device, serving_dtype(base.dtype)), factor) for adapter, factor in ready)
    chats = base.template.source is not None
    rendered = [base.template.render([{"role": "user", "content": p}]) if chats else p for p in prompts]
    limit = base.config.max_position_embeddings
    asked = [base.tokenizer.encode(text)[: limit - 1] for text in rendered]
    answered = _answer(base, active, asked, limit, run)
    lines = [prompt + answer[:-1] for prompt, answer in zip(asked, answered, strict=True)]
    stack = AdapterStack([adapter.weights for adapter, _ in active])
    entries = [(slot, factor) for slot, (_, factor) in enumerate(active)]
    lora = [LoraBatch.from_segments(stack, [(len(line), entries)], base.device) for line in lines]
    want = [run(partial(_logits, base.model, line, batch)) for line, batch in zip(lines, lora, strict=True)]
    probes = []
    for prompt, start, answer, line, expected in zip(prompts, asked, answered, lines, want, strict=True):
        got = run(partial(_logits, merged, line, None))  # (T, vocab)
        chosen = got[len(start) - 1 :].argmax(-1).tolist()
        probes.append(
            Probe(
                prompt,
                base.tokenizer.decode(answer),
                len(answer),
                sum(a == b for a, b in zip(chosen, answer, strict=True)),
                (got - expected).abs().max().item(),
            )
        )
    tokens = sum(probe.tokens for probe in probes)
    return Parity(
        max_logit_difference=max(probe.max_logit_difference for probe in probes),
        max_logit=max(expected.abs().max().item() for expected in want),
        greedy_tokens=tokens,
        greedy_agreement=sum(probe.same_greedy_tokens for probe in probes) / tokens,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        prompts=probes,
    )


def _answer(
    base: Base,
    adapters: tuple[tuple[Adapter, float], ...],
    prompts: list[list[int]],
    limit: int,
    run: Callable[[Callable[[], Any]], Any],
) -> list[list[int]]:
    """Greedy answers of the unmerged path, in one batch."""
    greedy = SamplingParams(temperature=0.0)
    room = [min(MAX_TOKENS, limit - len(prompt)) for prompt in prompts]
    longest = max(len(prompt) + more for prompt, more in zip(prompts, room, strict=True))
    cache = KVCache(base.config, len(prompts), longest, base.device, base.dtype)
    runner = Runner(base.model, cache, *(base.model.packing or (False, False)))  # as it serves
    engine = Engine(runner, Scheduler(Slots(len(prompts)), len(prompts), 512, max(len(adapters), 1)))
    sequences = [
        Sequence(prompt, greedy, more, adapters, base.eos_ids) for prompt, more in zip(prompts, room, strict=True)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for _, event in run(engine.step):
            if isinstance(event, LoraserveError):
                raise event
    return [sequence.output_token_ids for sequence in sequences]


@torch.inference_mode()
def _logits(model: Model, token_ids: list[int], lora: LoraBatch | None) -> Tensor:
    """Logits (T, vocab_size) float32 on the CPU."""
    device = model.model.rope.freqs.device
    attention = PackedAttention([len(token_ids)], device)
    logits = model(torch.tensor(token_ids, device=device), attention.positions, attention, lora).float().cpu()
    if not logits.isfinite().all():
        raise NotFinite
    return logits
