"""Prompt-lookup speculation: a sequence's next tokens, guessed from its own, and what the model made of the guess.

    … a b c d e f … a b c d  →  drafts e f …      so the latest earlier a b c d went on

A decoding step takes its drafts along as rows of their own. Each row's token is sampled from that row's logits, so what
is kept is what would have been sampled without drafts; a draft only decides whether the row after it is of any use.
Pure bookkeeping: no torch.
"""

from collections.abc import Sequence as List

NGRAM = 4
"""So many tokens at the end must have stood together before: fewer foretell too little to pay for their refusals."""
SHORTEST_REST, LONGEST_REST = 1, 64
"""Tokens without drafts after a refusal: twice as many after each further one, until a draft holds."""


class PromptLookup:
    """The drafts of one sequence.

    Where all drafts held, the next are one more; else as many as held, and where none did, the sequence rests.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Where the latest occurrence of an n-gram ends that something followed."""
        self._length = 2
        self._rest = SHORTEST_REST
        self._rest_until = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that it knows."""
        return len(self._tokens)

    def propose(self, new: List[int], most: int) -> tuple[int, ...]:
        """Read the sequence's new tokens and guess the next ones.

        Args:
            new: all that came after the first `num_tokens`.
            most: drafts at most.
        """
        tokens = self._tokens
        for token in new:
            if len(tokens) >= NGRAM:
                self._ends[tuple(tokens[-NGRAM:])] = len(tokens)
            tokens.append(token)
        count = min(self._length, most)
        if len(tokens) < self._rest_until or count < 1:
            return ()
        at = self._ends.get(tuple(tokens[-NGRAM:]))
        if at is None:
            return ()
        period = len(tokens) - at  # what follows may reach the end: then it goes round
        return tuple(tokens[at + i % period] for i in range(count))

    def learn(self, drafted: int, accepted: int) -> None:
        """Hear how many of the last drafts held."""
        self._length = max(accepted + (accepted == drafted), 1)
        if accepted:
            self._rest = SHORTEST_REST
        else:
            self._rest_until = len(self._tokens) + 1 + self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)
