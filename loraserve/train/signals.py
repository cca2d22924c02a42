"""SIGINT and SIGTERM as a wish to stop, which a run fulfils when it has saved its state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """The name of the signal that asked to stop, or None."""

    requested: str | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let SIGINT and SIGTERM ask for a stop; a second one acts as it would have without us."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.requested = signal.Signals(number).name
        signal.signal(number, handlers[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
