"""Which adapters are on the device and which may be dropped: a table, without threads and without arithmetic.

Dropped is the least recently used that no request holds and nobody in line up to the one served next waits for. Who is
further back may have to see its adapter go again, so the first in line gets its own as soon as those who run end.
Pinned adapters stay, except for a request that could not fit beside them at all.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraserve.errors import Conflict, InvalidRequest
from loraserve.lora.adapter import Adapter


@dataclass(eq=False)
class Entry:
    """An adapter on the device, of certain files. `users` are the requests that hold it."""

    name: str
    signature: object
    adapter: Adapter
    users: int = 0

    @property
    def num_bytes(self) -> int:
        return self.adapter.num_bytes


@dataclass(frozen=True)
class Choice:
    """What to load next, of how many bytes, and the names that must not make room for it."""

    name: str
    size: int
    kept: frozenset[str]


class Residency:
    """Adapters on a device of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        """What each name stands for, the least recently used first."""
        self.pinned: dict[str, int] = {}
        """Bytes by name, on the device or not."""
        self._old: set[Entry] = set()  # no longer what their name stands for, but held

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in (*self.entries.values(), *self._old))

    def use(self, name: str) -> Entry:
        """Hold an adapter for one request more."""
        entry = self.entries[name]
        entry.users += 1
        self.entries.move_to_end(name)
        return entry

    def free(self, entry: Entry) -> bool:
        """Let go of it for one request; return whether that was the last of an adapter that is no longer current."""
        entry.users -= 1
        if entry.users or entry not in self._old:
            return False
        self._old.remove(entry)
        return True

    def retire(self, name: str) -> Entry:
        """Let a name stand for nothing; whoever holds the adapter keeps it."""
        entry = self.entries.pop(name)
        if entry.users:
            self._old.add(entry)
        return entry

    def choose(self, line: Iterable[Mapping[str, int]]) -> Choice | None:
        """The next adapter to load for a line of requests, each {name: bytes}, or else a pinned one that is missing.

        None if nothing is missing, or as long as those who run leave the first that lacks something no room.
        """
        kept = {name for name, entry in self.entries.items() if entry.users}
        needed = sum(entry.num_bytes for entry in (*self._old, *(self.entries[name] for name in kept)))
        for sizes in line:
            missing = [name for name in sizes if name not in self.entries]
            for name, size in sizes.items():
                if name not in kept:
                    kept.add(name)
                    needed += size if name in missing else self.entries[name].num_bytes
            if missing:
                pins = self._pinned_beside(kept)
                spare = pins + sum(self.pinned.get(n, 0) for n in kept - sizes.keys()) + sum(sizes.values())
                if needed + (pins if spare <= self.capacity else 0) > self.capacity:
                    return None
                return Choice(missing[0], sizes[missing[0]], frozenset(kept))
        for name, size in self.pinned.items():
            if name not in self.entries and needed + self._pinned_beside(kept) + size <= self.capacity:
                return Choice(name, size, frozenset(kept))
        return None

    def make_room(self, choice: Choice) -> list[Entry]:
        """Drop what must go for it, and return that."""
        free = [name for name in self.entries if name not in choice.kept]
        order = [n for n in free if n not in self.pinned] + [n for n in free if n in self.pinned]
        dropped, total = [], self.num_bytes
        for name in order:
            if total + choice.size <= self.capacity:
                break
            dropped.append(self.retire(name))
            total -= dropped[-1].num_bytes
        return dropped

    def oversize(self, sizes: Mapping[str, int]) -> InvalidRequest | None:
        """The error for a request whose adapters, {name: bytes}, could never be here together; None if they could."""
        total = sum(sizes.values())
        if total <= self.capacity:
            return None
        alone = len(sizes) == 1
        what = f"adapter {next(iter(sizes))!r} needs" if alone else "the adapters of this blend together need"
        return InvalidRequest(
            f"{what} {_mib(total)}, more than the {_mib(self.capacity)} there are; "
            f"{'raise' if alone else 'blend fewer, or raise'} --adapter-memory",
            param="adapter",
        )

    def pinned_with(self, name: str, size: int) -> dict[str, int]:
        """What would be pinned with one adapter more. Raises Conflict if that could not be here together."""
        pinned = self.pinned | {name: size}
        if (total := sum(pinned.values())) > self.capacity:
            raise Conflict(
                f"with {name!r} the pinned adapters would need {_mib(total)}, more than the {_mib(self.capacity)} "
                "there are; unpin another, or raise --adapter-memory"
            )
        return pinned

    def _pinned_beside(self, kept: set[str]) -> int:
        return sum(self.entries[name].num_bytes for name in self.pinned if name in self.entries and name not in kept)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
