"""Adapters on the device, ready to serve: loaded when first asked for, kept until memory is short.

A request holds the Adapter object itself, so dropping one from the cache never disturbs a request that runs on it, and
a republished adapter is another object from the next request on.
"""

import threading
import weakref
from collections import OrderedDict

import torch

from loraserve.errors import InvalidRequest, QueueFull
from loraserve.kernels.threads import apart
from loraserve.lora.adapter import Adapter
from loraserve.lora.spec import Spec
from loraserve.registry import Registry


def serving_dtype(base: torch.dtype) -> torch.dtype:
    """What adapters beside a base of that dtype compute in: the same, but float32 where float16 would overflow."""
    return torch.float32 if base == torch.float16 else base


class AdapterCache:
    """Least-recently-used cache of device copies, in front of a Registry. Thread-safe.

    Args:
        capacity: bytes of A and B on the device at most, those that requests run on included. One adapter alone may be
            larger.
    """

    def __init__(self, registry: Registry, device: torch.device, dtype: torch.dtype, capacity: int) -> None:
        self._registry = registry
        self._device = device
        self._dtype = serving_dtype(dtype)
        self._capacity = capacity
        self._loaded: OrderedDict[str, tuple[object, Adapter]] = OrderedDict()  # name -> (files' signature, adapter)
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()  # also those that only a request still holds
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one load at a time: nobody loads the same twice, and memory is bounded

    def resolve(self, spec: Spec) -> tuple[tuple[Adapter, float], ...]:
        """Return the adapters of a SPEC with their weights, loading what is missing.

        Raises:
            AdapterNotFound, AdapterRefused: see `Registry.load`.
            QueueFull: the adapters of the requests in flight leave no room for another.
            InvalidRequest: the SPEC's own adapters do not fit together.
        """
        parts: list[tuple[Adapter, float]] = []
        for term in spec:
            parts.append((self._get(term.name, sum(adapter.num_bytes for adapter, _ in parts)), term.scale))
        return tuple(parts)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._loaded)

    def drop(self, name: str) -> bool:
        """Forget an adapter's device copy; return whether there was one."""
        with self._lock:
            return self._loaded.pop(name, None) is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters on the device, those that only a request still holds included."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(adapter.num_bytes for adapter in self._alive)

    def _get(self, name: str, beside: int) -> Adapter:
        """The adapter `name`; `beside` bytes are taken by others of the same SPEC."""
        if adapter := self._held(name, self._registry.get(name).signature):
            return adapter
        with self._loading:
            version = self._registry.get(name).signature
            if adapter := self._held(name, version):  # another thread has just loaded it
                return adapter
            adapter = apart(self._load, name)
            with self._lock:
                self._make_room(name, adapter.num_bytes, beside)
                self._alive.add(adapter)
                self._loaded[name] = (version, adapter)
            return adapter

    def _load(self, name: str) -> Adapter:
        return self._registry.load(name).to(self._device, self._dtype)

    def _held(self, name: str, version: object) -> Adapter | None:
        with self._lock:
            held = self._loaded.get(name)
            if held is None or held[0] != version:
                return None
            self._loaded.move_to_end(name)
            return held[1]

    def _make_room(self, name: str, size: int, beside: int) -> None:
        """Evict the least recently used until `size` bytes more fit; what a request runs on stays all the same."""
        self._loaded.pop(name, None)  # an older version
        while self._alive and self._size() + size > self._capacity:
            if not self._loaded and beside and beside + size > self._capacity:
                raise InvalidRequest(
                    f"the adapters of this blend need {(beside + size) / 2**20:.1f} MiB together, more than the "
                    f"{self._capacity / 2**20:.1f} MiB there are; blend fewer, or raise --adapter-memory",
                    param="adapter",
                )
            if not self._loaded:
                raise QueueFull(
                    f"adapter {name!r} needs {size / 2**20:.1f} MiB, and the adapters of requests in flight leave too "
                    f"little of {self._capacity / 2**20:.1f} MiB; try again in a moment, or raise --adapter-memory"
                )
            self._loaded.popitem(last=False)
