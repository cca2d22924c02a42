"""Dialogues as token ids, and which of them are supervised.

A token is supervised if it stands after `<|im_start|>assistant\\n` up to and including the next `<|im_end|>\\n`, both
found among the token ids as MiniMind finds them; the template's think block counts as part of the answer.

Source: MiniMind's SFTDataset; its random system prompt and empty-think removal are off unless asked for.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loraserve.base.chat import ChatTemplate
from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import InvalidRequest
from loraserve.train.dialogue import Dialogue, Message
from loraserve.train.rows import BadRow

ANSWER_START = "<|im_start|>assistant\n"
ANSWER_END = "<|im_end|>\n"
EMPTY_THINK = "<think>\n\n</think>\n\n"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer clearly and briefly.",
    "You are an assistant who gives accurate information.",
    "You are a small language model that does its best to help.",
    "Answer the user's questions with care.",
    "你是一个乐于助人的助手。",
    "你是一个友好的助手，请简明地回答问题。",
    "你是一个可靠的助手，请给出准确的信息。",
    "你是一个小巧的语言模型，请尽力帮助用户。",
    "请认真回答用户的问题。",
)


@dataclass(frozen=True)
class Sample:
    """One dialogue ready to train on."""

    input_ids: Tensor
    """(T,) int32."""
    supervised: Tensor
    """(T,) bool; position t is a target of the row before it."""


@dataclass(frozen=True)
class Augmentation:
    """MiniMind's random changes of a row, drawn anew in each epoch. Both default to never."""

    system_prompt: float = 0.0
    """Probability that a row without a system message gets a general one (MiniMind: 0.2)."""
    drop_empty_think: float = 0.0
    """Probability that the template's empty think blocks are removed (MiniMind-3: 0.8)."""

    def __bool__(self) -> bool:
        return self.system_prompt > 0 or self.drop_empty_think > 0


UNCHANGED = Augmentation()


def supervised_mask(input_ids: Sequence[int], start: Sequence[int], end: Sequence[int]) -> list[bool]:
    """Mark what follows each `start` up to and including the next `end`, or to the end of a dialogue cut before it."""
    ids = list(input_ids)
    mask = [False] * len(ids)
    after = 0
    while (first := _end_of(list(start), ids, after)) is not None:
        after = _end_of(list(end), ids, first) or len(ids)
        mask[first:after] = [True] * (after - first)
    return mask


def _end_of(pattern: list[int], ids: list[int], i: int) -> int | None:
    """Where the first `pattern` in `ids` from `i` on ends."""
    try:
        while True:
            i = ids.index(pattern[0], i)
            if ids[i : i + len(pattern)] == pattern:
                return i + len(pattern)
            i += 1
    except ValueError:
        return None


@dataclass(frozen=True)
class Encoding:
    """A dialogue as token ids, cut at the encoder's limit."""

    input_ids: list[int]
    supervised: list[bool]
    num_cut: int
    """Tokens beyond the limit."""
    left_out: tuple[str, ...]
    """Fields of the row that the base's template does not show: `tools`, `reasoning_content`."""


class Encoder:
    """Turns dialogues into token ids with a base's own tokenizer and template.

    Args:
        context: the most tokens the base can take.
        max_seq_len: cut longer dialogues after so many tokens, as MiniMind does; None cuts nothing.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, context: int, max_seq_len: int | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._start, self._end = tokenizer.encode(ANSWER_START), tokenizer.encode(ANSWER_END)
        self.context = context
        self.limit = min(max_seq_len, context) if max_seq_len else context
        self.cuts = max_seq_len is not None

    @property
    def digest(self) -> str:
        """Hash of everything that decides which token ids a dialogue becomes."""
        tokenizer = self._tokenizer
        settings = repr((tokenizer.special_tokens, self._template.source, self.limit, self.cuts))
        return hashlib.sha256(tokenizer.file.read_bytes() + settings.encode()).hexdigest()

    def encode(self, dialogue: Dialogue) -> Encoding:
        """Return a dialogue as it is trained on.

        Raises:
            BadRow: the template cannot render it, or not what it says; it is longer than the context and not cut;
                nothing in it is supervised; a message holds the marker by which answers are found.
        """
        try:
            text = self._render(dialogue.messages, dialogue.tools)
            ids = self._tokenizer.encode(text)
        except InvalidRequest as error:
            raise BadRow(str(error)) from None
        left_out = self._left_out(dialogue, text)
        if "tool_calls" in left_out:
            raise BadRow("the base's chat template leaves out 'tool_calls'; use a base whose template has tools")
        if len(ids) > self.limit and not self.cuts:
            raise BadRow(
                f"longer than the base's context of {self.context} tokens; shorten it, or cut it with "
                f"--max-seq-len {self.context}"
            )
        mask = supervised_mask(ids, self._start, self._end)
        if not any(mask):
            raise BadRow(f"nothing to supervise: the base's chat template puts no {ANSWER_START!r} before the answers")
        answers = sum(message["role"] == "assistant" for message in dialogue.messages)
        if sum(now and not before for before, now in pairwise([False, *mask])) > answers:
            raise BadRow(f"the text of a message holds {ANSWER_START!r}, after which an answer would be learned")
        if not any(mask[1 : self.limit]):
            raise BadRow(f"nothing to supervise within the first {self.limit} tokens; raise --max-seq-len")
        return Encoding(ids[: self.limit], mask[: self.limit], max(len(ids) - self.limit, 0), left_out)

    def encode_augmented(self, dialogue: Dialogue, augmentation: Augmentation, rng: random.Random) -> Sample | None:
        """Encode a dialogue with random changes; None if that leaves nothing supervised within the limit."""
        messages = dialogue.messages
        add_system = rng.random() < augmentation.system_prompt
        if add_system and messages[0]["role"] != "system" and not dialogue.tools:
            messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
        text = self._render(messages, dialogue.tools)
        if rng.random() < augmentation.drop_empty_think:
            text = text.replace(EMPTY_THINK, "")
        ids = self._tokenizer.encode(text)[: self.limit]
        supervised = torch.tensor(supervised_mask(ids, self._start, self._end), dtype=torch.bool)
        return Sample(torch.tensor(ids, dtype=torch.int32), supervised) if supervised[1:].any() else None

    def _render(self, messages: list[Message], tools: list[Any] | None) -> str:
        return self._template.render(messages, tools=tools, add_generation_prompt=False)

    def _left_out(self, dialogue: Dialogue, text: str) -> tuple[str, ...]:
        """The fields of a dialogue without which the template renders the same."""
        found = []
        for field in ("tool_calls", "reasoning_content"):
            if any(message.get(field) for message in dialogue.messages):
                without = [{k: v for k, v in message.items() if k != field} for message in dialogue.messages]
                if self._render(without, dialogue.tools) == text:
                    found.append(field)
        if dialogue.tools and self._render(dialogue.messages, None) == text:
            found.append("tools")
        return tuple(found)
