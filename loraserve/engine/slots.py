"""The cache's slots: who owns which, and what the free ones still hold. The prefix cache is no more than that.

A slot keeps the keys and values of the sequence that left it until its room is needed, the least recently used first.
A new sequence starts where the longest prefix that it shares with another, running or gone, ends. Values serve only
those for whom the same weights would make them: the key is which adapters, by content and weight, merged or not, and
the tokens. Pure bookkeeping: no torch; the copies that `take` asks for are carried out by the engine.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from loraserve.engine.sequence import Sequence

MIN_SHARED = 16
"""Tokens; to copy fewer would not pay."""
SHORT_TAIL = 32
"""A slot is taken over in place if no more tokens than this are lost with it."""


@dataclass(frozen=True)
class Copy:
    """The first `count` positions of slot `source`, to be copied to slot `target`."""

    source: int
    target: int
    count: int


@dataclass
class _Held:
    """What a free slot holds."""

    key: Hashable
    tokens: list[int]
    used: int


class Slots:
    """Slots by number.

    Args:
        num_slots: how many.
        share_prefixes: whether sequences may start from what others computed.
    """

    def __init__(self, num_slots: int, share_prefixes: bool = True) -> None:
        self._free: dict[int, _Held | None] = dict.fromkeys(range(num_slots))
        self._owners: dict[int, Sequence] = {}
        self._share = share_prefixes
        self._clock = 0
        self.num_shared_tokens = 0
        """Prompt tokens that did not have to be computed."""

    def __bool__(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    @property
    def num_held(self) -> int:
        """Free slots that hold something."""
        return sum(held is not None for held in list(self._free.values()))  # any thread asks

    def take(self, sequence: Sequence) -> Copy | None:
        """Give a slot to a sequence that has computed nothing; return the copy that must come before its first step.

        Its `num_computed` is then the length of the prefix that it shares.
        """
        source, shared = self._longest(sequence) if self._share else (-1, 0)
        held = self._free.get(source)
        if held is not None and len(held.tokens) - shared <= SHORT_TAIL:
            slot = source
        else:
            slot = min(self._free, key=self._worth)
        self._free.pop(slot)
        self._owners[slot] = sequence
        sequence.slot, sequence.num_computed, sequence.num_shared = slot, shared, shared
        self.num_shared_tokens += shared
        return Copy(source, slot, shared) if shared and source != slot else None

    def give_back(self, sequence: Sequence, keep: bool = True) -> None:
        """Free the slot of a sequence.

        Args:
            keep: its keys and values are sound, and may serve others.
        """
        del self._owners[sequence.slot]
        held = None
        if keep and self._share and sequence.num_computed:
            self._clock += 1
            held = _Held(key_of(sequence), sequence.tokens(0, sequence.num_computed), self._clock)
        self._free[sequence.slot] = held
        sequence.slot = -1

    def _worth(self, slot: int) -> tuple[int, int]:
        """Orders free slots: the empty ones first, the lowest of them, which keeps the cache dense; then by age."""
        held = self._free[slot]
        return (0, slot) if held is None else (held.used, slot)

    def _longest(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that shares most with a sequence, and how much; its last token is never shared."""
        key, prompt = key_of(sequence), sequence.prompt_token_ids
        best, most = -1, MIN_SHARED - 1
        known = {slot: (key_of(owner), owner.tokens(0, owner.num_computed)) for slot, owner in self._owners.items()}
        known |= {slot: (held.key, held.tokens) for slot, held in self._free.items() if held is not None}
        for slot, (made_by, tokens) in known.items():
            if made_by == key and (shared := _common(prompt[:-1], tokens, most)) > most:
                best, most = slot, shared
        return (best, most) if best >= 0 else (-1, 0)


def key_of(sequence: Sequence) -> Hashable:
    """What made a sequence's keys and values, besides its tokens."""
    if sequence.merged is not None:
        return "merged", sequence.merged.digest
    return tuple((adapter.digest, weight) for adapter, weight in sequence.adapters)


def _common(a: list[int], b: list[int], most: int) -> int:
    """Length of the common prefix, if it is longer than `most`; else anything up to `most`."""
    if min(len(a), len(b)) <= most or a[: most + 1] != b[: most + 1]:
        return 0
    low, high = most + 1, min(len(a), len(b))  # a[:low] == b[:low]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
