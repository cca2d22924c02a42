"""One load of an adapter, in a thread that ends with it (see `kernels/threads.py`). Knows nothing of who waits."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from loraserve.engine.adapter_tiers import AdapterTiers
from loraserve.errors import LoraserveError
from loraserve.lora.adapter import Adapter
from loraserve.registry import Record, Registry

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """What to load, and how that ended."""

    name: str
    size: int
    """Bytes there is room for; what the adapter needs, after the load."""
    to_host: bool = False
    dropped: tuple[Adapter, ...] = ()
    """To make room for it."""
    outdated: bool = False
    """Whether other files were asked for since it began to read, or none at all."""
    signature: object = None
    """Of the files it reads."""
    adapter: Adapter | None = None
    """None after an error, for the host's memory, and if there was not room enough."""
    error: LoraserveError | None = None
    seconds: float = 0.0


class Loader:
    """Carries out jobs for a device whose A and B take `itemsize` bytes a number."""

    def __init__(self, registry: Registry, tiers: AdapterTiers, itemsize: int) -> None:
        self._registry = registry
        self._tiers = tiers
        self._itemsize = itemsize

    def size_of(self, record: Record) -> int:
        """Bytes an adapter needs on the device."""
        return record.num_parameters * self._itemsize

    def start(self, job: Job, ended: Callable[[Job], None]) -> None:
        """Begin a load; `ended` hears of its end, in the load's thread. Raises RuntimeError if there is no thread."""
        threading.Thread(target=self._run, args=(job, ended), name="loraserve-loader", daemon=True).start()

    def _run(self, job: Job, ended: Callable[[Job], None]) -> None:
        began = perf_counter()
        try:
            record = self._registry.get(job.name)
            job.signature = record.signature
            room, job.size = job.size, self.size_of(record)
            if job.size > room:
                pass  # a version that was published meanwhile
            elif job.to_host:
                self._tiers.warm(job.name, record.signature)
            else:
                job.adapter = self._tiers.fetch(job.name, record.signature)
        except LoraserveError as refusal:
            job.error = refusal
        except Exception as fault:
            log.exception("adapter %r could not be loaded", job.name)
            job.error = LoraserveError(f"adapter {job.name!r} could not be loaded ({type(fault).__name__}: {fault})")
        job.seconds = perf_counter() - began
        ended(job)
