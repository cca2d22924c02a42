"""One request's claim on the adapters of its SPEC: made, joined to the line, taken, released."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraserve.engine.residency import Entry
from loraserve.errors import LoraserveError
from loraserve.lora.adapter import Adapter

if TYPE_CHECKING:
    from loraserve.engine.adapter_cache import AdapterCache

Held = tuple[tuple[Adapter, float], ...]
"""Adapters with their weights."""


@dataclass(eq=False)
class Lease:
    """Made by `AdapterCache.lease`, which also guards its state."""

    cache: "AdapterCache"
    weights: dict[str, float]
    sizes: dict[str, int]
    """Bytes on the device, by name."""
    signatures: dict[str, object]
    """Of the files as they were when the claim was made, or when they were last read while it was in line."""
    error: LoraserveError | None = None
    on_failure: Callable[[LoraserveError], None] | None = None
    held: list[Entry] = field(default_factory=list)
    seen: int = -1
    """`cache.num_changes` when something was last found missing."""

    def join(self, on_failure: Callable[[LoraserveError], None] | None = None) -> None:
        """Enter the line. `on_failure` hears, in any thread, that an adapter turned out to be unusable.

        Raises:
            NotReady: no load can begin.
        """
        self.on_failure = on_failure
        self.cache._join(self)

    def peek(self) -> Held | None:
        """The adapters if all are on the device; cheap while nothing changes."""
        return None if self.seen == self.cache.num_changes else self.cache._peek(self)

    @property
    def short_of_room(self) -> bool:
        """Whether the line waits for those who hold adapters to end, and not for a load."""
        return self.cache.short_of_room

    def take(self) -> Held | None:
        """The same, held from now on."""
        return self.cache._take(self)

    def release(self) -> None:
        """Let go of what is held, or leave the line. Idempotent."""
        self.cache._release(self)
