"""How well a model still knows general language: its perplexity on everyday text and dialogues that ship with it.

    perplexity = exp(mean over all tokens but each text's first of -log p(token | the tokens before))

`general.jsonl` holds paragraphs and dialogues in English and Chinese, written for this purpose and used nowhere in
training. Numbers of bases with different tokenizers cannot be compared.
"""

import json
import math
from importlib.resources import files

import torch

from loraserve.base.load import Base
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import pack, summed_loss
from loraserve.train.data import Sample

TEXTS_PER_BATCH = 4


def general_samples(base: Base) -> list[Sample]:
    """The texts as the base reads them, every token supervised, cut at its context."""
    samples = []
    for line in files("loraserve.train").joinpath("general.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if "messages" in row:
            text = base.template.render(row["messages"], add_generation_prompt=False)
        else:
            text = row["text"]
        ids = base.tokenizer.encode(text)[: base.config.max_position_embeddings]
        samples.append(Sample(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids), dtype=torch.bool)))
    return samples


@torch.no_grad()
def mean_loss(base: Base, samples: list[Sample], stack: AdapterStack | None, batch_size: int) -> float:
    """Mean cross-entropy per supervised token.

    Args:
        stack: the one adapter, or None for the base alone.
    """
    batches = [pack(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    total = sum(float(summed_loss(base.model, batch, stack)) for batch in batches)
    return total / sum(batch.num_supervised for batch in batches)


def perplexity(base: Base, stack: AdapterStack | None) -> float:
    """Of the base, or of the base with an adapter, on the general text; inf where it cannot be said."""
    loss = mean_loss(base, general_samples(base), stack, TEXTS_PER_BATCH)
    return math.exp(loss) if loss < 700 else math.inf
