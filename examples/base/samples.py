"""From chat dialogues to batches of training samples: token ids, and the weight of each as a target."""

import random
from collections.abc import Iterator

import corpus as texts
import sentencepiece

WEIGHTS = {"assistant": 1.0, "user": 0.2, "system": 0.0}
"""Of a message's tokens in the loss."""
FIRST_TOKENS = 6
"""So many tokens of an answer decide which one it is; what follows is soon known by heart."""
CUT_SHORT = 0.75
"""How often an answer ends after them, which leaves more time for more questions."""
POOL = 8
"""So many batches are drawn at once and sorted by length: sequences of a batch are padded to its longest in attention."""
BPE_DROPOUT = 0.1
"""Of merges in half of the questions, so that a word and its parts are known to be related."""

Sample = tuple[list[int], list[float]]
"""Token ids and the weight of each as a target."""


def encode(dialogue: list[texts.Message], tokenizer: sentencepiece.SentencePieceProcessor) -> Sample:
    ids: list[int] = []
    weights: list[float] = []
    tail = tokenizer.encode("\n")
    for message in dialogue:
        head = [1, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), 2]
        ids += head + body + tail
        weights += [0.0] * len(head) + [WEIGHTS[message["role"]]] * len(body) + [0.0] * len(tail)
    return ids, weights


def vary(
    dialogue: list[texts.Message], tokenizer: sentencepiece.SentencePieceProcessor, rng: random.Random, broken: bool
) -> Sample:
    """Encode a dialogue for training: a lone exchange may be cut short and, if `broken`, be split into other tokens."""
    if len(dialogue) > 2:
        return encode(dialogue, tokenizer)
    head = [1, *tokenizer.encode("user\n")]
    asked = dialogue[0]["content"]
    question = [*(encode_question(asked, tokenizer, rng) if broken else tokenizer.encode(asked)), 2]
    between = [*tokenizer.encode("\n"), 1, *tokenizer.encode("assistant\n")]
    answer = [*tokenizer.encode(dialogue[1]["content"]), 2]
    if rng.random() < CUT_SHORT:
        answer = answer[:FIRST_TOKENS]
    weights = [0.0] * len(head) + [WEIGHTS["user"]] * len(question) + [0.0] * len(between) + [1.0] * len(answer)
    return head + question + between + answer, weights


def encode_question(text: str, tokenizer: sentencepiece.SentencePieceProcessor, rng: random.Random) -> list[int]:
    if rng.random() < 0.5:
        return tokenizer.encode(text)
    return tokenizer.encode(text, enable_sampling=True, alpha=BPE_DROPOUT, nbest_size=-1)


def batches(
    dialogues: Iterator[list[texts.Message]],
    tokenizer: sentencepiece.SentencePieceProcessor,
    rng: random.Random,
    size: int,
    broken: bool,
) -> Iterator[list[Sample]]:
    """Yield batches of at least `size` tokens, each of samples about equally long."""
    while True:
        pool: list[Sample] = []
        while sum(len(ids) for ids, _ in pool) < POOL * size:
            pool.append(vary(next(dialogues), tokenizer, rng, broken))
        pool.sort(key=lambda sample: len(sample[0]))
        cut: list[list[Sample]] = [[]]
        for sample in pool:
            if sum(len(ids) for ids, _ in cut[-1]) >= size:
                cut.append([])
            cut[-1].append(sample)
        if len(cut) > POOL:  # what is left over
            cut[-2] += cut.pop()
        rng.shuffle(cut)
        yield from cut
