"""Dialogues as token ids, and which of them are supervised.

A token is supervised if it stands after `<|im_start|>assistant\\n` up to and including the next `<|im_end|>\\n`, both
found among the token ids as MiniMind finds them; the template's think block counts as part of the answer.

All randomness is a function of (seed, epoch, row): a resumed run repeats an interrupted one without saved generators.
The order of an epoch is MiniMind's, `torch.randperm` seeded with seed + epoch.
Source: MiniMind's SFTDataset; its random system prompt and empty-think removal are off unless asked for.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraserve.base.chat import ChatTemplate
from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import InvalidRequest
from loraserve.train.rows import DataFile, Dialogue, Problems

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


def supervised_mask(input_ids: Sequence[int], start: Sequence[int], end: Sequence[int]) -> list[bool]:
    """Mark what follows each `start` up to and including the next `end`, or to the end of a dialogue cut before it."""
    ids, start, end = list(input_ids), list(start), list(end)
    mask = [False] * len(ids)
    i = 0
    while i < len(ids):
        if ids[i] != start[0] or ids[i : i + len(start)] != start:
            i += 1
            continue
        first = i = i + len(start)
        while i < len(ids) and ids[i : i + len(end)] != end:
            i += 1
        i = min(i + len(end), len(ids))
        mask[first:i] = [True] * (i - first)
    return mask


class Encoder:
    """Turns dialogues into samples with a base's own tokenizer and template.

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

    def encode_file(self, data: DataFile) -> tuple[list[Sample], int]:
        """Encode every dialogue of a file.

        Returns:
            the samples in file order, and how many of them were cut at max_seq_len.

        Raises:
            DataError: rows the template cannot render, rows longer than the context (unless they are cut), rows in
                which nothing is supervised; all are named.
        """
        problems, samples, num_cut = Problems(data.name), [], 0
        longest = 0
        for dialogue in data.dialogues:
            try:
                ids = self._tokenizer.encode(self._render(dialogue))
            except InvalidRequest as error:
                problems.add(dialogue.line, str(error))
                continue
            sample = self._sample(ids)
            if len(ids) > self.limit and not self.cuts:
                longest = max(longest, len(ids))
                problems.add(dialogue.line, f"longer than the base's context of {self.context} tokens")
            elif not sample.supervised[1:].any():
                problems.add(dialogue.line, self._why_unsupervised(ids))
            num_cut += len(ids) > self.limit
            samples.append(sample)
        problems.raise_if_any(
            f"the longest has {longest}: shorten them, or cut them with --max-seq-len {self.context}" if longest else ""
        )
        return samples, num_cut

    def encode_augmented(self, dialogue: Dialogue, augmentation: Augmentation, rng: random.Random) -> Sample | None:
        """Encode a dialogue with random changes; None if that leaves nothing supervised within the limit."""
        messages = dialogue.messages
        add_system = rng.random() < augmentation.system_prompt
        if add_system and messages[0]["role"] != "system" and not dialogue.tools:
            messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
        text = self._render(Dialogue(messages, dialogue.tools, dialogue.line))
        if rng.random() < augmentation.drop_empty_think:
            text = text.replace(EMPTY_THINK, "")
        sample = self._sample(self._tokenizer.encode(text))
        return sample if sample.supervised[1:].any() else None

    def _render(self, dialogue: Dialogue) -> str:
        return self._template.render(dialogue.messages, tools=dialogue.tools, add_generation_prompt=False)

    def _sample(self, ids: list[int]) -> Sample:
        ids = ids[: self.limit]
        mask = supervised_mask(ids, self._start, self._end)
        return Sample(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool))

    def _why_unsupervised(self, ids: list[int]) -> str:
        if any(supervised_mask(ids, self._start, self._end)):
            return f"nothing to supervise within the first {self.limit} tokens; raise --max-seq-len"
        return f"nothing to supervise: the base's chat template puts no {ANSWER_START!r} before the answers"


class Dataset:
    """The samples of a training run, split into training and validation.

    Args:
        val_split: the fraction of rows held out, drawn by `seed`; at least one row when it is above 0.
        val_data: rows to validate on, instead of those held out.
    """

    def __init__(
        self,
        data: DataFile,
        encoder: Encoder,
        *,
        seed: int,
        val_split: float = 0.0,
        val_data: DataFile | None = None,
        augmentation: Augmentation = Augmentation(),
    ) -> None:
        self._encoder, self._augmentation, self._seed = encoder, augmentation, seed
        samples, self.num_cut = encoder.encode_file(data)
        held_out = min(max(round(val_split * len(samples)), 1), len(samples) - 1) if val_split > 0 else 0
        shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        split = sorted(shuffled[held_out:]), sorted(shuffled[:held_out])
        self._train = [samples[i] for i in split[0]]
        self.train_dialogues = [data.dialogues[i] for i in split[0]]
        self.val_dialogues = [data.dialogues[i] for i in split[1]]
        self.val = [samples[i] for i in split[1]]
        if val_data is not None:
            self.val, num_cut = encoder.encode_file(val_data)
            self.val_dialogues = val_data.dialogues
            self.num_cut += num_cut

    def __len__(self) -> int:
        return len(self._train)

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch (counted from 0), in the order they are trained on."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(len(self), generator=generator).tolist()

    def sample(self, epoch: int, row: int) -> Sample:
        """The training sample of `row` as it is in `epoch`."""
        if not self._augmentation:
            return self._train[row]
        rng = random.Random(f"{self._seed}/{epoch}/{row}")
        changed = self._encoder.encode_augmented(self.train_dialogues[row], self._augmentation, rng)
        return changed or self._train[row]
