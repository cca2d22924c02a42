"""Which sequences run in the next step, and how many tokens of each. Pure bookkeeping: no torch, no clock.

Running sequences that decode come first, one token each; what is left of the step's token budget goes to prompts, in
order of arrival, in chunks. While the rows of a step are few, sequences that decode take drafts along, see
`speculation`. A sequence owns one cache slot from admission to its end, so nothing is ever preempted.
"""

from collections import deque
from dataclasses import dataclass

from loraserve.engine.sequence import Sequence
from loraserve.engine.slots import Copy, Slots

PATIENCE = 2.0
"""Seconds for which others may overtake a sequence whose adapters have no room; then everybody waits."""
SPARE_ROWS = 4
"""Weights are read once for so many rows, which is what most of a CPU's step takes: drafts fill a step up to that."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, to be computed in this step, and the drafts of the next ones."""

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.count + len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """(num_rows,), at positions from `start` on."""
        return [*self.sequence.tokens(self.start, self.count), *self.drafts]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that a new one is sampled."""
        return self.start + self.count == self.sequence.num_tokens


class Scheduler:
    """Continuous batching over a fixed number of cache slots.

    Args:
        slots: of the cache.
        max_running: sequences that can run at once, no more than there are slots.
        max_batched_tokens: tokens computed in one step at most.
        max_adapters: distinct adapters in one step at most.
        max_drafts: of a sequence in one step.
    """

    def __init__(
        self, slots: Slots, max_running: int, max_batched_tokens: int, max_adapters: int, max_drafts: int = 0
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.copies: list[Copy] = []
        """To be carried out, in order, before the step that has just been scheduled."""
        self._slots = slots
        self._max_running = max_running
        self._max_batched_tokens = max_batched_tokens
        self._max_adapters = max_adapters
        self._max_drafts = max_drafts

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self, now: float) -> list[Chunk]:
        """Admit what fits and return the chunks of the next step: first those that decode, then prompts.

        Args:
            now: seconds, of any clock that only goes forward.
        """
        self.copies = []
        self._admit(now)
        decoding = [s for s in self.running if s.num_computed == s.num_tokens - 1]
        chunks = self._with_drafts(decoding)
        budget = max(self._max_batched_tokens - len(chunks), 0)
        for sequence in self.running:
            left = sequence.num_tokens - sequence.num_computed
            if left > 1 and budget > 0:
                chunks.append(Chunk(sequence, sequence.num_computed, min(left, budget)))
                budget -= chunks[-1].count
        return chunks

    def _with_drafts(self, decoding: list[Sequence]) -> list[Chunk]:
        """One token of each, and what drafts there is room for; none beside prompts, whose rows are many anyway."""
        room = SPARE_ROWS - len(decoding) if len(decoding) == len(self.running) else 0
        chunks = []
        for sequence in decoding:
            chunks.append(Chunk(sequence, sequence.num_computed, 1, sequence.draft(min(room, self._max_drafts))))
            room -= len(chunks[-1].drafts)
        return chunks

    def release(self, sequence: Sequence, sound: bool = True) -> None:
        """Forget a finished or aborted sequence and free its slot.

        Args:
            sound: its keys and values may serve others.
        """
        if sequence.slot >= 0:
            self._slots.give_back(sequence, keep=sound)
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self, now: float) -> None:
        active = {id(adapter) for s in self.running for adapter, _ in s.adapters}
        passed_over: deque[Sequence] = deque()
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting.popleft()
            if not self._equip(sequence, active):
                passed_over.append(sequence)  # later ones may need none, or some that are here
                sequence.turn = now if sequence.turn is None else sequence.turn
                if now - sequence.turn >= PATIENCE and _lacks_room(sequence):
                    break  # those who run end, and make room; a slow load would not be any faster for it
                continue
            active |= {id(adapter) for adapter, _ in sequence.adapters}
            if copy := self._slots.take(sequence):
                self.copies.append(copy)
            self.running.append(sequence)
        self.waiting.extendleft(reversed(passed_over))

    def _equip(self, sequence: Sequence, active: set[int]) -> bool:
        """Whether a sequence has its adapters, and they fit beside the active ones; it holds them then."""
        adapters = sequence.adapters if sequence.lease is None else sequence.lease.peek()
        if adapters is None:
            return False
        if self.running and len(active | {id(adapter) for adapter, _ in adapters}) > self._max_adapters:
            return False
        if sequence.lease is not None:
            taken = sequence.lease.take()
            sequence.adapters = taken or ()
            return taken is not None
        return True


def _lacks_room(sequence: Sequence) -> bool:
    """Whether a sequence that was passed over waits for others to end: for memory, or a place among the active."""
    lease = sequence.lease
    return lease is None or lease.peek() is not None or lease.short_of_room
