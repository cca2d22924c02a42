"""Pick the next token of each row, vectorised over the batch.

Order: penalties, then greedy where temperature is 0; elsewhere temperature, top-k, top-p, min-p, and one uniform number
of the request's own stream through the inverse of the cumulative distribution. So a request's choice depends on its own
logits and seed alone. Log-probabilities are those of the model itself, before penalties and temperature.
"""

import torch
from torch import Tensor

from loraserve.engine.sequence import Sequence, Token

GREEDY_BELOW = 1e-5
"""Temperatures too small to divide by are the argmax they tend to."""


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Token]:
    """Sample one token for each row.

    Args:
        logits: (S, vocab_size), any float dtype; row i belongs to sequences[i].

    Returns:
        One Token per row, not yet appended to its sequence and without a finish reason.
    """
    raw = logits.float()
    logits = _penalised(raw, sequences)
    chosen = logits.argmax(dim=-1)  # (S,)
    random_rows = [i for i, s in enumerate(sequences) if s.params.temperature > GREEDY_BELOW]
    if random_rows:
        picked = _draw(logits[random_rows], [sequences[i] for i in random_rows])
        chosen[random_rows] = picked
    token_ids = chosen.tolist()
    if all(s.params.logprobs is None for s in sequences):
        return [Token(token_id) for token_id in token_ids]
    return _with_logprobs(raw.log_softmax(dim=-1), token_ids, sequences)


def _penalised(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    if not any(s.params.has_penalties for s in sequences):
        return logits
    logits = logits.clone()
    for row, sequence in zip(logits, sequences, strict=True):
        params = sequence.params
        if not params.has_penalties:
            continue
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *sequence.output_token_ids}), device=logits.device)
        score = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(score > 0, score / factor, score * factor)
        if sequence.output_token_ids:
            output = torch.tensor(sequence.output_token_ids, device=logits.device)
            used, counts = output.unique(return_counts=True)
            row[used] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draw from the filtered distributions; logits (S, V), returns (S,) int64."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    params = [s.params for s in sequences]
    vocab = logits.shape[1]
    logits, order = (logits / column([p.temperature for p in params])).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    logits = logits.masked_fill(rank >= column([p.top_k if p.top_k > 0 else vocab for p in params]), -torch.inf)
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens
    drop = before >= column([p.top_p if p.top_p < 1 else 2.0 for p in params])
    drop |= probs < column([p.min_p for p in params]) * probs[:, :1]
    drop[:, 0] = False
    mass = probs.masked_fill(drop, 0.0).double().cumsum(dim=-1)
    uniform = torch.tensor([[s.uniform()] for s in sequences], dtype=torch.float64, device=logits.device)
    at = torch.searchsorted(mass, uniform * mass[:, -1:], right=True).clamp_(max=vocab - 1)
    return order.gather(1, at).squeeze(1)


def _with_logprobs(logprobs: Tensor, token_ids: list[int], sequences: list[Sequence]) -> list[Token]:
    most = max(s.params.logprobs or 0 for s in sequences)
    values, ids = logprobs.topk(most, dim=-1)
    rows = zip(logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None]).squeeze(1).tolist(),
               ids.tolist(), values.tolist(), strict=True)  # fmt: skip
    tokens = []
    for token_id, sequence, (own, top_ids, top_values) in zip(token_ids, sequences, rows, strict=True):
        wanted = sequence.params.logprobs
        if wanted is None:
            tokens.append(Token(token_id))
        else:
            top = tuple(zip(top_ids[:wanted], top_values[:wanted], strict=True))
            tokens.append(Token(token_id, logprob=own, top_logprobs=top))
    return tokens
