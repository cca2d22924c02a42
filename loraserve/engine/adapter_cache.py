"""Adapters on the device, in float32 as they are trained: loaded when first asked for, kept until memory is short.

A request holds the Adapter object itself, so dropping one from the cache never disturbs a request that runs on it, and
a republished adapter is another object from the next request on.
"""

import threading
from collections import OrderedDict

import torch

from loraserve.lora.adapter import Adapter
from loraserve.lora.spec import Spec
from loraserve.registry import Registry


class AdapterCache:
    """Least-recently-used cache of device copies, in front of a Registry. Thread-safe.

    Args:
        capacity: bytes of A and B kept at most; one adapter is always kept.
    """

    def __init__(self, registry: Registry, device: torch.device, capacity: int) -> None:
        self._registry = registry
        self._device = device
        self._capacity = capacity
        self._loaded: OrderedDict[str, tuple[object, Adapter]] = OrderedDict()  # name -> (files' signature, adapter)
        self._lock = threading.Lock()

    def resolve(self, spec: Spec) -> tuple[tuple[Adapter, float], ...]:
        """Return the adapters of a SPEC with their weights, loading what is missing.

        Raises:
            AdapterNotFound, AdapterRefused: see `Registry.load`.
        """
        return tuple((self._get(term.name), term.scale) for term in spec)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._loaded)

    def drop(self, name: str) -> bool:
        """Forget an adapter's device copy; return whether there was one."""
        with self._lock:
            return self._loaded.pop(name, None) is not None

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(adapter.num_bytes for _, adapter in self._loaded.values())

    def _get(self, name: str) -> Adapter:
        version = self._registry.get(name).signature
        with self._lock:
            held = self._loaded.get(name)
            if held and held[0] == version:
                self._loaded.move_to_end(name)
                return held[1]
        adapter = self._registry.load(name).to(self._device, torch.float32)
        with self._lock:
            held = self._loaded.get(name)
            if held and held[0] == version:  # another thread was faster: keep one object, so that batches share it
                return held[1]
            self._loaded[name] = (version, adapter)
            self._loaded.move_to_end(name)
            size = sum(a.num_bytes for _, a in self._loaded.values())
            while size > self._capacity and len(self._loaded) > 1:
                _, (_, evicted) = self._loaded.popitem(last=False)
                size -= evicted.num_bytes
        return adapter
