"""Where adapters come from: the disk, the host's memory, the device's. Moves the numbers; knows nothing of requests.

    device    what a step computes with; what stays here is `AdapterCache`'s to say
    host      pinned copies, least recently used first out, from which the device is filled in one copy
    disk      the registry's safetensors

On a CPU device and host are one memory, so nothing is kept twice. One thread at a time loads, and it should end soon
after: see `kernels/threads.py`.
"""

import threading
from collections import OrderedDict

import torch

from loraserve.lora.adapter import Adapter
from loraserve.lora.dora import WeightOf, prepared
from loraserve.lora.packed import Packed
from loraserve.registry import Registry


def serving_dtype(base: torch.dtype) -> torch.dtype:
    """What adapters beside a base of that dtype compute in: the same, but float32 where float16 would overflow."""
    return torch.float32 if base == torch.float16 else base


class AdapterTiers:
    """Brings adapters to a device.

    Args:
        dtype: of A and B on host and device.
        host_capacity: bytes of copies in the host's memory.
        has_host: whether copies are kept there, by default where the device has a memory of its own.
        weight_of: the base's weights, which DoRA adapters are prepared for; None if there are none of them.
    """

    def __init__(
        self,
        registry: Registry,
        device: torch.device,
        dtype: torch.dtype,
        host_capacity: int,
        has_host: bool | None = None,
        weight_of: WeightOf | None = None,
    ) -> None:
        self._registry = registry
        self._device = device
        self._dtype = dtype
        self._weight_of = weight_of
        self._host_capacity = host_capacity
        self.has_host = device.type != "cpu" if has_host is None else has_host
        self._host: OrderedDict[str, tuple[object, Packed]] = OrderedDict()  # name -> (files' signature, copy)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in the host's memory, where it is a tier of its own."""
        with self._lock:
            return self._size()

    def fetch(self, name: str, signature: object) -> Adapter:
        """Bring an adapter's files of that signature, or newer ones, to the device, from the nearest tier.

        Raises:
            AdapterNotFound, AdapterRefused: see `Registry.load`.
        """
        return self._to_device(self._at_host(name, signature)).adapter

    def warm(self, name: str, signature: object) -> None:
        """Bring an adapter from disk to the host's memory. Raises as `fetch` does."""
        self._at_host(name, signature)

    def has_room_for(self, name: str, signature: object, size: int) -> bool:
        """Whether the host lacks a copy, and could take one without dropping another."""
        with self._lock:
            lacks = self._host.get(name, (None,))[0] != signature
            return lacks and self._size() + size <= self._host_capacity

    def forget(self, name: str) -> None:
        """Drop an adapter's copy in the host's memory."""
        with self._lock:
            self._host.pop(name, None)

    def _at_host(self, name: str, signature: object) -> Packed:
        with self._lock:
            held = self._host.get(name)
            if held is not None and held[0] == signature:
                self._host.move_to_end(name)
                return held[1]
        adapter = self._registry.load(name)
        if self._weight_of is not None:
            adapter = prepared(adapter, self._weight_of)
        packed = Packed.of(adapter, self._dtype, pinned=self._device.type == "cuda")
        if self.has_host:
            with self._lock:
                self._host.pop(name, None)
                while self._host and self._size() + packed.adapter.num_bytes > self._host_capacity:
                    self._host.popitem(last=False)
                self._host[name] = signature, packed
        return packed

    def _to_device(self, packed: Packed) -> Packed:
        if not self.has_host:
            return packed
        if self._stream is None:
            return packed.over(packed.buffer.to(self._device, copy=True))
        with torch.cuda.device(self._device):
            main = torch.cuda.default_stream(self._device)
            with torch.cuda.stream(main):  # the engine's stream owns the memory, so its reuse is in that stream's order
                buffer = torch.empty_like(packed.buffer, device=self._device, pin_memory=False)
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):
                buffer.copy_(packed.buffer, non_blocking=True)
            self._stream.synchronize()  # this thread waits, the engine does not
        return packed.over(buffer)

    def _size(self) -> int:
        return sum(packed.adapter.num_bytes for _, packed in self._host.values())
