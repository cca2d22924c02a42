"""Keeps OpenMP's threads to the thread that serves.

Every thread that runs a parallel loop gets a pool of helpers of its own, as many as there are cores, and they stay as
long as it does. Once there are more of them than cores, helpers sleep between loops and must be woken for each, which
can double the time of a decoding step. So whoever else computes does it in a thread that ends.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def apart(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in a thread of its own and return, or raise, what it does; its helpers end with it."""
    result: Future[R] = Future()

    def run(result: Future[R] = result) -> None:
        try:
            result.set_result(function(*args, **kwargs))
        except BaseException as error:
            result.set_exception(error)

    thread = Thread(target=run, name="loraserve-apart")  # an executor takes half a millisecond longer
    thread.start()
    thread.join()
    try:
        return result.result()
    finally:
        del result  # what failed holds this frame, which must not hold what failed
