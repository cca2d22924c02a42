"""The learning rate over a run: MiniMind's cosine, from the full rate down to a tenth of it.

    lr(k) = peak · (0.1 + 0.45 · (1 + cos(π · k / total)))

k counts micro-batches from 1; an optimizer step uses the rate of its last micro-batch.
"""

import math


def learning_rate(step: int, total: int, peak: float) -> float:
    """The rate at micro-batch `step` (from 1) of `total`."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
