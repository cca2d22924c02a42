"""Pick the next token of each row, vectorised over the batch, and wait for the device once.

Order: penalties, then greedy where temperature is 0; elsewhere temperature, top-k, top-p, min-p, and one uniform number
of the request's own stream through the inverse of the cumulative distribution. So a request's choice depends on its own
logits, tokens and seed alone. Log-probabilities are those of the model itself, before penalties and temperature.
"""

from collections import Counter
from collections.abc import Sequence as List

import torch
from torch import Tensor

from loraserve.engine.sequence import Sequence, Token

GREEDY_BELOW = 1e-5
"""Temperatures too small to divide by are the argmax they tend to."""


Drafts = List[tuple[int, ...]]


def sample(logits: Tensor, sequences: list[Sequence], drafts: Drafts | None = None) -> list[Token | None]:
    """Sample one token for each row.

    Args:
        logits: (S, vocab_size), any float dtype; row i belongs to sequences[i].
        drafts: per row, the tokens that come before it beyond those of its sequence; none by default.

    Returns:
        One Token per row, not yet appended to its sequence and without a finish reason; None for a row that is not
        finite.
    """
    raw = logits.float()
    drafts = [()] * len(sequences) if drafts is None else drafts
    logits = _penalised(raw, sequences, drafts)
    random_rows = [i for i, s in enumerate(sequences) if s.params.temperature > GREEDY_BELOW]
    if len(random_rows) == len(sequences):
        chosen = _draw(logits, sequences, drafts)  # (S,)
    else:
        chosen = logits.argmax(dim=-1)
        if random_rows:
            rows = _send(random_rows, torch.int64, logits.device)
            of_rows = [sequences[i] for i in random_rows], [drafts[i] for i in random_rows]
            chosen.index_copy_(0, rows, _draw(logits[rows], *of_rows))
    columns = [raw.sum(dim=-1, keepdim=True), chosen.unsqueeze(1)]  # NaN and Inf survive a sum
    wanted = [s.params.logprobs for s in sequences]
    most = max((count or 0 for count in wanted), default=0)
    if any(count is not None for count in wanted):
        logprobs = raw.log_softmax(dim=-1)
        top, ids = logprobs.topk(most, dim=-1)
        columns += [logprobs.gather(1, chosen.unsqueeze(1)), ids, top]
    # Everything in one tensor, for to wait for the device takes time; float64 holds ids and float32 exactly.
    found = torch.cat([column.double() for column in columns], dim=1).cpu()
    finite = found[:, 0].isfinite().tolist()
    return [_token(row, count, most) if sound else None
            for row, count, sound in zip(found[:, 1:].tolist(), wanted, finite, strict=True)]  # fmt: skip


def _token(row: list[float], wanted: int | None, most: int) -> Token:
    """The Token of a row: its id, then its log-probability, `most` alternatives and theirs."""
    token_id = int(row[0])
    if wanted is None:
        return Token(token_id)
    top = zip(map(int, row[2 : 2 + wanted]), row[2 + most : 2 + most + wanted], strict=True)
    return Token(token_id, logprob=row[1], top_logprobs=tuple(top))


def _send(values: List[int] | List[float] | List[List[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _penalised(logits: Tensor, sequences: list[Sequence], drafts: Drafts) -> Tensor:
    if not any(s.params.has_penalties for s in sequences):
        return logits
    logits = logits.clone()
    for row, sequence, drafted in zip(logits, sequences, drafts, strict=True):
        params = sequence.params
        if not params.has_penalties:
            continue
        answer = [*sequence.output_token_ids, *drafted]
        tokens = sorted({*sequence.prompt_token_ids, *answer})
        seen = _send(tokens, torch.int64, logits.device)
        score = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(score > 0, score / factor, score * factor)
        if answer:
            counts = Counter(answer)
            amounts = [params.frequency_penalty * n + params.presence_penalty for n in counts.values()]
            row[_send(list(counts), torch.int64, logits.device)] -= _send(amounts, torch.float32, logits.device)
    return logits


def _draw(logits: Tensor, sequences: list[Sequence], drafts: Drafts) -> Tensor:
    """Draw from the filtered distributions; logits (S, V), returns (S,) int64."""
    vocab = logits.shape[1]
    settings = [
        [p.temperature, p.top_k if p.top_k > 0 else vocab, p.top_p if p.top_p < 1 else 2.0, p.min_p, s.uniform(len(d))]
        for s, p, d in ((s, s.params, d) for s, d in zip(sequences, drafts, strict=True))
    ]
    table = _send(settings, torch.float64, logits.device)  # (S, 5)
    temperature, top_k, top_p, min_p = table[:, :4].float().unsqueeze(2).unbind(1)  # (S, 1) each
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    logits = logits.masked_fill(rank >= top_k, -torch.inf)
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens
    drop = before >= top_p
    drop |= probs < min_p * probs[:, :1]
    drop[:, 0] = False
    mass = probs.masked_fill(drop, 0.0).double().cumsum(dim=-1)
    at = torch.searchsorted(mass, table[:, 4:] * mass[:, -1:], right=True).clamp_(max=vocab - 1)
    return order.gather(1, at).squeeze(1)
