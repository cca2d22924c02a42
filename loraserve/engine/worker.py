"""The one thread that owns the model. Everybody else hands it sequences and reads per-request queues.

A failure of one request fails that request. A crash of the step fails every waiter with a clear error and ends
readiness; nothing hangs. An aborted sequence frees its slot before the next step.

Who reads is woken at once for the first token and the last, and between them as often as WAKE_UPS leaves for each: to
wake sixty threads after every step would take much of the processor from the model. They are woken when the next step
has come to the model, whose products let other threads run: before, they would take the interpreter from the engine.
Nobody waits for a token that is there while a step reads prompts.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from loraserve.engine.engine import Engine, Event
from loraserve.engine.sequence import Sequence
from loraserve.errors import LoraserveError, NotReady, QueueFull

log = logging.getLogger(__name__)


WAKE_UPS = 1000
"""A second, of all readers together."""


@dataclass
class _Outbox:
    """What a reader waits for, and what it has not been woken for yet."""

    queue: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    held: list[Event] = field(default_factory=list)
    due: float = 0.0
    """When it may be woken again."""

    def deliver(self, events: list[Event]) -> None:
        for event in events:
            self.queue.put(event)

    def fail(self, error: LoraserveError) -> None:
        """Deliver what is held, and the error that ends it."""
        self.deliver([*self.held, error])


class _Call:
    """A function to run between two steps, and the promise of its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def __call__(self) -> None:
        try:
            self.future.set_result(self.function())
        except BaseException as error:
            self.future.set_exception(error)


class _Abort:
    """The end of a sequence by its caller, or by an error of its own. Its adapters are free even if that crashes."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence

    def __call__(self) -> None:
        try:
            self._engine.abort(self._sequence)
        finally:
            self.let_go()

    def let_go(self) -> None:
        _let_go(self._sequence)


class Worker:
    """Runs an Engine in its own thread.

    Args:
        max_requests: requests running and waiting at once; one more is refused with QueueFull.
    """

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outboxes: dict[Sequence, _Outbox] = {}
        self._ready: list[tuple[_Outbox, list[Event]]] = []
        """Who is to be woken next, and for what. The engine's thread alone touches it."""
        self._lock = threading.RLock()  # guards _outboxes and _failure; who joins may have to fail others
        self._failure: str | None = "the engine is not started"
        self.num_submitted = 0
        """Sequences accepted since the start."""
        self._thread = threading.Thread(target=self._run, name="loraserve-engine", daemon=True)

    @property
    def ready(self) -> bool:
        return self._failure is None

    @property
    def num_requests(self) -> int:
        return len(self._outboxes)

    def check_ready(self) -> None:
        """Raise NotReady if the engine is not running."""
        if self._failure is not None:
            raise NotReady(self._failure)

    def start(self) -> None:
        self._failure = None
        self._thread.start()

    def stop(self) -> None:
        """Fail what is in flight and end the thread."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    def submit(self, sequence: Sequence) -> "queue.SimpleQueue[Event]":
        """Queue a sequence; its tokens, or the error that ended it, arrive in the returned queue.

        Raises:
            QueueFull: `max_requests` are in flight.
            NotReady: the engine is not running, or cannot load adapters now.
        """
        outbox = _Outbox()
        with self._lock:
            self.check_ready()
            if len(self._outboxes) >= self._max_requests:
                raise QueueFull(f"all {self._max_requests} places are taken; try again in a moment")
            self._outboxes[sequence] = outbox
            try:
                if sequence.lease is not None:  # with the lock held, so that adapters come in the order of the queue
                    sequence.lease.join(lambda error: self.fail(sequence, error))
            except BaseException:
                self._outboxes.pop(sequence, None)
                _let_go(sequence)
                raise
            self.num_submitted += 1
            self._inbox.put(lambda: self._engine.add(sequence))
        return outbox.queue

    def fail(self, sequence: Sequence, error: LoraserveError) -> None:
        """End a sequence by an error of its own. Harmless if it has ended."""
        if (outbox := self._end(sequence)) is not None:
            outbox.fail(error)

    def post(self, function: Callable[[], None]) -> None:
        """Let the engine's thread run `function` between two steps, and do not wait for it. Must not raise."""
        self._inbox.put(function)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence; nothing that is generated from now on arrives in its queue. Harmless if it has ended."""
        self._end(sequence)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the engine's thread between two steps and return its result.

        Raises:
            NotReady: the engine is not running.
        """
        call = _Call(function)
        with self._lock:
            self.check_ready()
            self._inbox.put(call)
        return call.future.result()

    def _end(self, sequence: Sequence) -> _Outbox | None:
        with self._lock:
            outbox = self._outboxes.pop(sequence, None)
            if (
                outbox is not None
            ):  # with the lock held, so that an engine that fails lets go of it one way or the other
                self._inbox.put(_Abort(self._engine, sequence))
        return outbox

    def _run(self) -> None:
        try:
            while self._drain():
                self._step()
            self._fail("the engine has been stopped")
        except Exception as error:
            log.exception("the engine's step crashed")
            self._fail(f"the engine crashed ({type(error).__name__}: {error}); restart the server")

    def _drain(self) -> bool:
        """Take commands until there is work; return False when told to stop."""
        try:
            while self._take():
                pass
            return False
        except queue.Empty:
            return True

    def _take(self) -> bool:
        """Run the next command. In a scope of its own, so that no ended request is kept while waiting for the next."""
        if not self._engine.has_work:
            self._deliver()
        command = self._inbox.get(block=not self._engine.has_work)
        if command is None:
            return False
        if isinstance(command, _Call):  # which may compute as long as a step
            self._deliver()
        command()
        return True

    def _step(self) -> None:
        """In a scope of its own, as `_take` is."""
        events = self._engine.step(self._deliver)  # which leaves another list of who is ready
        self._ready += self._due(events)

    def _deliver(self, reads_prompts: bool = False) -> None:
        """Wake who is ready, and before a step that reads prompts whoever a token is held for."""
        if reads_prompts:
            self._ready += self._held()
        ready, self._ready = self._ready, []
        for outbox, events in ready:
            outbox.deliver(events)

    def _held(self) -> list[tuple[_Outbox, list[Event]]]:
        """Take what readers have not been woken for."""
        with self._lock:
            found = [(outbox, outbox.held) for outbox in self._outboxes.values() if outbox.held]
            for outbox, _ in found:
                outbox.held = []
        return found

    def _due(self, events: list[tuple[Sequence, Event]]) -> list[tuple[_Outbox, list[Event]]]:
        """Who is to be woken, and for what. Who reads that a request has ended finds its adapter free."""
        due = []
        with self._lock:
            ended = set()
            touched: dict[Sequence, _Outbox] = {}
            for sequence, event in events:
                if (outbox := self._outboxes.get(sequence)) is not None:
                    touched[sequence] = outbox
                    outbox.held.append(event)
                    if isinstance(event, LoraserveError) or event.finish_reason:
                        ended.add(sequence)
            now, pause = time.monotonic(), len(touched) / WAKE_UPS
            for sequence, outbox in touched.items():
                if sequence in ended:
                    del self._outboxes[sequence]
                if sequence in ended or now >= outbox.due:
                    due.append((outbox, outbox.held))
                    outbox.held, outbox.due = [], now + pause
        return due

    def _fail(self, reason: str) -> None:
        self._deliver()
        with self._lock:
            self._failure = reason
            waiting, self._outboxes = self._outboxes, {}
        for sequence, outbox in waiting.items():
            outbox.fail(NotReady(reason))
            _let_go(sequence)
        while not self._inbox.empty():  # calls that came too late must not wait for ever
            command = self._inbox.get()
            if isinstance(command, _Call):
                command.future.set_exception(NotReady(reason))
            elif isinstance(command, _Abort):
                command.let_go()


def _let_go(sequence: Sequence) -> None:
    if sequence.lease is not None:
        sequence.lease.release()
