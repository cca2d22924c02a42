"""What the routes of one app share: the engine, the registry, the default adapter and the metrics."""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flask import current_app
from werkzeug.exceptions import Forbidden

from loraserve.base.load import Base
from loraserve.engine.service import Service
from loraserve.errors import AdapterNotFound, ModelNotFound, NotFound
from loraserve.jobs import JobQueue
from loraserve.lora.spec import Spec
from loraserve.registry import Registry
from loraserve.server.metrics import Metrics
from loraserve.server.selection import Selection, select

EXTENSION = "loraserve"
MAX_WATCHERS = 8
"""Streams of a job's events at once: each holds a thread."""


@dataclass
class State:
    """The shared state of an app.

    `queue` is None on a server that does not train. `unloaded` are adapters that `/v1/unload_lora_adapter` took out of
    service; their files stay in the registry.
    """

    service: Service
    base_name: str
    default: Spec
    metrics: Metrics
    queue: JobQueue | None = None
    watchers: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(MAX_WATCHERS))
    closing: threading.Event = field(default_factory=threading.Event)
    unloaded: set[str] = field(default_factory=set)
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def base(self) -> Base:
        return self.service.base

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def training(self) -> JobQueue:
        """The queue of training jobs. Raises Forbidden where this server does not train."""
        if self.queue is None:
            raise Forbidden("this server does not train; `loraserve serve --training` lets its clients do so")
        return self.queue

    def names(self, after: str = "", query: str = "") -> Iterator[str]:
        """The adapters in service, in order; see `Registry.iterate`."""
        return (name for name in self.registry.iterate(after, query) if name not in self.unloaded)

    def has(self, name: str) -> bool:
        """Whether an adapter is in service."""
        return name not in self.unloaded and self.registry.has(name)

    def select(self, model: str | None, adapter: Spec | None) -> Selection:
        """Decide the adapters of a request; see `selection.select`. Unloaded ones are unknown."""
        selection = select(model, adapter, base_name=self.base_name, default=self.default)
        if self.unloaded and any(term.name in self.unloaded for term in selection.spec):
            raise self.unknown(selection)
        return selection

    def unknown(self, selection: Selection) -> NotFound:
        """The error for a selection with an adapter that is not there, put to the field that named it."""
        known = list(self.names())
        missing = next((term.name for term in selection.spec if term.name not in known), selection.spec[0].name)
        hint = _listing(known)
        if selection.param == "model":
            return ModelNotFound(missing, [self.base_name, *known], param="model", hint=hint)
        return AdapterNotFound(missing, known, param=selection.param, hint=hint)


def _listing(known: Iterable[str]) -> str:
    names = list(known)
    if not names:
        return "this server has no adapters yet"
    return f"adapters here: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def current() -> State:
    """The state of the app that handles this request."""
    state: State = current_app.extensions[EXTENSION]
    return state
