"""Two sides, each an adapter or the base alone, measured on the same text and asked the same questions."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from loraserve.base.load import Base
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.dora import prepared
from loraserve.lora.stack import AdapterStack
from loraserve.train.data import Encoder
from loraserve.train.dialogue import read_dialogue
from loraserve.train.general import mean_loss, perplexity
from loraserve.train.rows import DataFile
from loraserve.train.samples import Comparison, Sides, compare
from loraserve.train.tokens import tokenize

MAX_DIALOGUES = 1000
BATCH_SIZE = 8
NUM_ANSWERS = 3


@torch.no_grad()
def measure(base: Base, sides: Sides, data: Path | None) -> tuple[dict[str, list[float]], list[Comparison]]:
    """Measure both sides.

    Args:
        sides: two adapters' weights; None is the base alone.
        data: dialogues to measure the loss on, the first thousand of them, and to take three questions from.

    Returns:
        {figure: [of the first, of the second]}, and the answers: `before` is the first's.

    Raises:
        DataError: the file has rows that cannot be used.
    """
    first, second = sides = _on_device(sides[0], base), _on_device(sides[1], base)
    stacks = [AdapterStack([side]) if side else None for side in (first, second)]
    figures = {"perplexity on general text": [perplexity(base, stack) for stack in stacks]}
    if data is None:
        return figures, []
    file = DataFile(data)
    encoder = Encoder(base.tokenizer, base.template, base.config.max_position_embeddings, None)
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenize(file, encoder, Path(folder), "stop", lambda _text: None)
        samples = [tokens.sample(row) for row in range(min(len(tokens), MAX_DIALOGUES))]
        figures[f"loss on {file.name}"] = [mean_loss(base, samples, stack, BATCH_SIZE) for stack in stacks]
    dialogues = (read_dialogue(row) for row in file.rows())
    return figures, compare(base, sides, dialogues, NUM_ANSWERS)


def _on_device(weights: Mapping[str, LoraWeight] | None, base: Base) -> dict[str, LoraWeight] | None:
    if weights is None:
        return None
    ready = prepared(Adapter(weights), base.weight_of).weights
    return {target: weight.to(base.device) for target, weight in ready.items()}
