"""Adapters merged while they are served: each has the layers it targets for itself and shares the rest of the base.

    merged = cast(fp32(W) + fp32(ΔW))       W from the base's files, rounded once, to what the base computes in

A request for exactly such an adapter, at scale 1, runs on the merged model and costs what the base costs. The base,
blends, other scales and other adapters never meet it. A request keeps the model it was submitted with, so an unmerge
disturbs nobody, and the memory is free after the last of them. A merge belongs to the content that was merged: when the
adapter's files change, it is dropped.
"""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraserve.base.derived import derive, own_bytes, with_neighbours
from loraserve.base.load import Base
from loraserve.base.model import Model
from loraserve.engine.merge import merged_config, merged_layer, read_pristine
from loraserve.engine.parity import Parity, compare
from loraserve.errors import Conflict, LoraserveError
from loraserve.kernels.threads import apart
from loraserve.lora.adapter import Adapter
from loraserve.lora.spec import Spec
from loraserve.registry import Registry


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """One adapter's merged model."""

    name: str
    digest: str
    """`Adapter.digest` of what was merged."""
    model: Model
    num_layers: int
    """Linear layers that changed."""
    untied: bool
    """Its head is not the embeddings, while the base's is."""
    num_bytes: int
    """What it does not share with the base, in device memory."""
    seconds: float
    """What the merge took, the comparison included."""
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """The report, without the weights."""
        return {
            "sha256": self.digest,
            "changed_layers": self.num_layers,
            "untied_lm_head": self.untied,
            "bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
            "parity": self.parity.to_dict(),
        }


class HotMerges:
    """The merged adapters of a running engine. Thread-safe.

    Args:
        base: packed for serving; only read.
        capacity: bytes at most, of all merged layers together, those that only a request still holds included.
        call: runs a function in the thread that owns the model, between two steps, and returns its result.
    """

    def __init__(self, base: Base, registry: Registry, capacity: int, call: Callable[[Callable[[], Any]], Any]) -> None:
        self._base = base
        self._registry = registry
        self._capacity = capacity
        self._call = call
        self._held: dict[str, tuple[object, MergedAdapter]] = {}  # name -> (files' signature, merged)
        self._alive: weakref.WeakSet[MergedAdapter] = weakref.WeakSet()  # also those that only a request still holds
        self._underway: str | None = None  # one merge at a time: nobody merges the same twice, and memory is bounded
        self._changed = threading.Condition()  # guards all of these

    def merge(self, name: str) -> MergedAdapter:
        """Merge an adapter; one that is merged already stays as it is.

        Waits for a merge that is under way. After an error all is as it was before.

        Raises:
            AdapterNotFound, AdapterRefused: see `Registry.load`.
            Conflict: there is no memory left for it.
            CheckpointError: the base's files have changed since it was loaded, or a merged weight overflows.
            NotReady: the engine is not running.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._underway is None)
            self._underway = name
        try:
            while (merged := self.get(name)) is None:  # again, if its files changed while it was merged
                self._install(name, apart(self._build, name))
            return merged
        finally:
            with self._changed:
                self._underway = None
                self._changed.notify_all()

    def drop(self, name: str) -> bool:
        """Forget an adapter's merge, after one that is under way; return whether there was one."""
        with self._changed:
            self._changed.wait_for(lambda: self._underway != name)
            return self._held.pop(name, None) is not None

    def get(self, name: str) -> MergedAdapter | None:
        """The merge of an adapter whose content is still what was merged, else None: then it is dropped.

        Raises:
            AdapterNotFound, AdapterRefused: see `Registry.load`; only if it was merged, and it is dropped.
        """
        held = self._held.get(name)
        if held is None:
            return None
        try:
            if self._registry.get(name).signature == held[0]:
                return held[1]
            signature, adapter = apart(self._load, name)  # another version, or only touched?
        except LoraserveError:
            self._forget(name, held)
            raise
        if adapter.digest != held[1].digest:
            self._forget(name, held)
            return None
        with self._changed:
            if self._held.get(name) is held:
                self._held[name] = signature, held[1]
        return held[1]

    def find(self, spec: Spec) -> MergedAdapter | None:
        """The merged adapter that answers a SPEC, which is exactly that adapter at scale 1; None for any other.

        Raises:
            AdapterNotFound, AdapterRefused: see `get`.
        """
        return self.get(spec[0].name) if len(spec) == 1 and spec[0].scale == 1.0 else None

    def current(self) -> dict[str, MergedAdapter]:
        """The merged adapters by name; those whose files are gone or changed are dropped."""
        found = {}
        for name in list(self._held):
            try:
                merged = self.get(name)
            except LoraserveError:
                continue
            if merged is not None:
                found[name] = merged
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all merged layers, those that only a request still holds included."""
        with self._changed:
            return sum(merged.num_bytes for merged in self._alive)

    def _install(self, name: str, held: tuple[object, MergedAdapter]) -> None:
        with self._changed:
            self._held[name] = held
            self._alive.add(held[1])

    def _forget(self, name: str, held: tuple[object, MergedAdapter]) -> None:
        with self._changed:
            if self._held.get(name) is held:
                del self._held[name]

    def _load(self, name: str) -> tuple[object, Adapter]:
        """An adapter as it was trained, and the signature of the files it was read from."""
        while True:
            signature = self._registry.get(name).signature
            adapter = self._registry.load(name)
            if self._registry.get(name).signature == signature:
                return signature, adapter

    def _build(self, name: str) -> tuple[object, MergedAdapter]:
        start = time.perf_counter()
        base = self._base
        signature, adapter = self._load(name)
        targets = with_neighbours(base.model, adapter.weights)
        size = sum(base.shapes[target][0] * base.shapes[target][1] for target in targets)
        size *= 1 if base.int8 else base.dtype.itemsize
        self._check_room(name, size)
        checkpoint = read_pristine(base)
        config = merged_config(base.config, targets)
        model = derive(
            base.model,
            config,
            targets,
            lambda target: merged_layer(checkpoint, target, [(adapter, 1.0)], base.dtype).to(base.device),
        )
        merged = MergedAdapter(
            name=name,
            digest=adapter.digest,
            model=model,
            num_layers=len(adapter.weights),
            untied=base.config.tie_word_embeddings and not config.tie_word_embeddings,
            num_bytes=own_bytes(model, base.model),
            parity=compare(base, [(adapter, 1.0)], model, run=self._call),
            seconds=time.perf_counter() - start,
        )
        return signature, merged

    def _check_room(self, name: str, size: int) -> None:
        others = sorted(self.current().keys() - {name})
        if (taken := self.num_bytes) + size > self._capacity:
            raise Conflict(
                f"merging {name!r} needs {size / 2**20:.1f} MiB, and merged adapters "
                f"{'(' + ', '.join(others) + ') ' if others else ''}take {taken / 2**20:.1f} of "
                f"{self._capacity / 2**20:.1f} MiB; unmerge one, or raise --merge-memory"
            )
