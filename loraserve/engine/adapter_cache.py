"""Adapters on the device: who waits for which, who holds which, and loading them ahead of need.

A request joins the line with a `Lease` on the adapters of its SPEC; when all of them are on the device it takes them,
and holds them until it ends. Missing ones are loaded in the order of the line, one at a time, each in a thread that
ends (see `kernels/threads.py`), while the engine goes on. What is dropped to make room is `Residency`'s to say. A fault
that only the load reveals fails the requests that wait for that adapter, and no other. A republished adapter is another
entry: requests that hold the old one keep it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loraserve.engine.adapter_tiers import AdapterTiers, serving_dtype
from loraserve.engine.lease import Held, Lease
from loraserve.engine.loading import Job, Loader
from loraserve.engine.residency import Choice, Entry, Residency
from loraserve.errors import NotReady
from loraserve.lora.adapter import Adapter
from loraserve.lora.dora import WeightOf
from loraserve.lora.spec import Spec, Term
from loraserve.registry import Registry

__all__ = ["AdapterCache", "serving_dtype"]

log = logging.getLogger(__name__)
HOST_SHARE = 4
"""Copies in the host's memory may take so many times the bytes of the device's."""


class AdapterCache:
    """The adapters on a device, in front of a Registry. Thread-safe.

    Args:
        capacity: bytes of A and B on the device at most, those that requests hold included.
        host_capacity: bytes of copies in the host's memory where that is another one.
        has_host, weight_of: see `AdapterTiers`.
    """

    def __init__(
        self,
        registry: Registry,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int,
        host_capacity: int | None = None,
        has_host: bool | None = None,
        weight_of: WeightOf | None = None,
    ) -> None:
        dtype = serving_dtype(dtype)
        self._registry = registry
        host_capacity = host_capacity or HOST_SHARE * capacity
        self._tiers = AdapterTiers(registry, device, dtype, host_capacity, has_host, weight_of)
        self._loader = Loader(registry, self._tiers, dtype.itemsize)
        self._table = Residency(capacity)
        self._line: dict[Lease, None] = {}  # who waits, in order of arrival
        self._failed: list[Lease] = []  # who left the line by an error and must hear of it
        self._job: Job | None = None
        self._changed = threading.Condition()  # guards all of this
        self.num_changes = 0
        """Grows whenever somebody in line may go on."""
        self.short_of_room = False
        """Whether what is missing has no room, if anything is missing, until some who hold others end."""
        self.num_loads = self.num_evictions = 0
        self.load_seconds = 0.0
        self.on_change: Callable[[], None] = lambda: None
        """Called, in any thread, whenever somebody in line may go on."""
        self.on_evict: Callable[[Adapter], None] = lambda adapter: None
        """Called, in any thread, with what has been dropped. Must not call back."""

    def lease(self, spec: Spec) -> Lease | None:
        """Claim the adapters of a SPEC; None if it needs none. Nothing is loaded yet.

        Raises:
            AdapterNotFound, AdapterRefused: one cannot be used, as far as can be told without its weights.
            InvalidRequest: together they are larger than the memory for adapters.
        """
        records = [(term, self._registry.get(term.name)) for term in spec]
        used = [(term, record) for term, record in records if term.scale]
        if not used:
            return None
        sizes = {term.name: self._loader.size_of(record) for term, record in used}
        if problem := self._table.oversize(sizes):
            raise problem
        weights = {term.name: term.scale for term, _ in used}
        return Lease(self, weights, sizes, {term.name: record.signature for term, record in used})

    @contextmanager
    def hold(self, spec: Spec) -> Iterator[Held]:
        """Wait until the adapters of a SPEC are on the device; hold them within the block. Raises as `lease` does."""
        if (lease := self.lease(spec)) is None:
            yield ()
            return
        lease.join()
        try:
            with self._changed:
                while (held := lease.take()) is None and lease.error is None:
                    self._changed.wait()
            if held is None:
                assert lease.error is not None
                raise lease.error
            yield held
        finally:
            lease.release()

    def resolve(self, spec: Spec) -> Held:
        """Wait for the adapters of a SPEC and return them with their weights. Raises as `lease` does."""
        with self.hold(spec) as held:
            return held

    def pin(self, name: str) -> None:
        """Bring an adapter to the device and keep it there, this version and later ones, until it is unpinned.

        Raises:
            AdapterNotFound, AdapterRefused: it cannot be used.
            Conflict: the pinned adapters together would be larger than the memory for adapters.
        """
        size = self._loader.size_of(self._registry.get(name))
        with self._changed:
            self._table.pinned_with(name, size)
        with self.hold((Term(name),)) as held, self._changed:
            self._table.pinned = self._table.pinned_with(name, held[0][0].num_bytes)

    def unpin(self, name: str) -> None:
        """Let an adapter be dropped like any other; harmless if it is not pinned."""
        with self._changed:
            if self._table.pinned.pop(name, None) is not None:
                self._advance()
        self._tell()

    def pinned(self) -> set[str]:
        with self._changed:
            return set(self._table.pinned)

    def has(self, name: str) -> bool:
        """Whether it is on the device."""
        return name in self._table.entries

    def names(self) -> list[str]:
        """What is on the device."""
        with self._changed:
            return sorted(self._table.entries)

    def drop(self, name: str) -> bool:
        """Forget an adapter's copies in memory, and that it is pinned; return whether the device had one."""
        self._tiers.forget(name)
        with self._changed:
            self._table.pinned.pop(name, None)
            if self._job is not None and self._job.name == name:
                self._job.outdated = True
            found = name in self._table.entries
            if found:
                self._retire(name)
            self._advance()
        self._tell()
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters on the device, older versions that requests still hold included."""
        with self._changed:
            return self._table.num_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in the host's memory, where that is another one."""
        return self._tiers.host_bytes

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def _join(self, lease: Lease) -> None:
        with self._changed:
            self._line[lease] = None
            for name, signature in lease.signatures.items():
                entry, job = self._table.entries.get(name), self._job
                if entry is not None and entry.signature != signature:
                    self._retire(name)
                if job is not None and job.name == name and job.signature not in (None, signature):
                    job.outdated = True
            self._advance()
            if (error := lease.error) is not None:
                self._failed.remove(lease)  # it hears of it here
        self._tell()
        if error is not None:
            raise error

    def _peek(self, lease: Lease) -> Held | None:
        with self._changed:
            entries = self._table.entries
            if lease not in self._line or any(name not in entries for name in lease.weights):
                lease.seen = self.num_changes
                return None
            return tuple((entries[name].adapter, weight) for name, weight in lease.weights.items())

    def _take(self, lease: Lease) -> Held | None:
        with self._changed:
            if (held := self._peek(lease)) is not None:
                del self._line[lease]
                lease.held = [self._table.use(name) for name in lease.weights]
            return held

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._line:
                del self._line[lease]
            elif not lease.held:
                return
            for entry in lease.held:
                if self._table.free(entry):
                    self.on_evict(entry.adapter)
            lease.held = []
            self._advance()
        self._tell()

    def _retire(self, name: str) -> None:
        entry = self._table.retire(name)
        if not entry.users:
            self.on_evict(entry.adapter)

    def _advance(self) -> None:
        """Begin the next load, if there is one and room for it; who needs it fails if it cannot even begin."""
        while self._job is None or self._job.to_host:
            choice = self._table.choose(lease.sizes for lease in self._line)
            was_short, self.short_of_room = self.short_of_room, choice is None
            if was_short and choice is not None:
                self.on_change()  # others need not wait for a load
            if self._job is not None or (job := self._next_job(choice)) is None:
                return
            self._job = job
            try:
                self._loader.start(job, self._ended)
            except (RuntimeError, MemoryError) as fault:
                job.error = NotReady(f"adapter {job.name!r} cannot be loaded now ({fault}); try again in a moment")
                self._settle(job)
                for gone in job.dropped:
                    self.on_evict(gone)

    def _next_job(self, choice: Choice | None) -> Job | None:
        if choice is not None:
            dropped = tuple(entry.adapter for entry in self._table.make_room(choice))
            self.num_evictions += len(dropped)
            return Job(choice.name, choice.size, dropped=dropped)
        if self._tiers.has_host:  # the device is full: what will be wanted next can come nearer
            for lease in self._line:
                for name, signature in lease.signatures.items():
                    if name not in self._table.entries and self._tiers.has_room_for(name, signature, lease.sizes[name]):
                        return Job(name, lease.sizes[name], to_host=True)
        return None

    def _ended(self, job: Job) -> None:
        with self._changed:
            self._settle(job)
            self._advance()
        for gone in job.dropped:  # not before, so that the engine changes its set of adapters once
            self.on_evict(gone)
        self.on_change()
        self._tell()

    def _settle(self, job: Job) -> None:
        """See who can go on after a load, and who has failed."""
        self._job = None
        if job.adapter is not None and not job.outdated:
            self.num_loads += 1
            self.load_seconds += job.seconds
            self._table.entries[job.name] = Entry(job.name, job.signature, job.adapter)
        if job.outdated:
            self._tiers.forget(job.name)
        else:
            self._update(job)
        for lease in list(self._line):
            lease.error = self._table.oversize(lease.sizes) or (
                None if job.outdated or job.name not in lease.sizes else job.error
            )
            if lease.error is not None:
                self._failed.append(lease)
                del self._line[lease]
        if job.error is not None and not job.outdated and self._table.pinned.pop(job.name, None) is not None:
            log.warning("adapter %r is no longer pinned: %s", job.name, job.error)
        self.num_changes += 1
        self._changed.notify_all()

    def _tell(self) -> None:
        """Let those know that have failed; not while the lock is held, for who hears of it may hold others."""
        with self._changed:
            failed, self._failed = self._failed, []
        for lease in failed:
            if lease.on_failure is not None and lease.error is not None:
                lease.on_failure(lease.error)

    def _update(self, job: Job) -> None:
        """What was published since somebody joined the line is what it waits for now."""
        for lease in self._line:
            if job.name in lease.sizes:
                lease.sizes[job.name] = job.size
                lease.signatures[job.name] = job.signature or lease.signatures[job.name]
        if job.name in self._table.pinned:
            self._table.pinned[job.name] = job.size
