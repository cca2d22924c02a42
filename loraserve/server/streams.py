"""Several generations of one request read as one stream, for as long as the client is there to listen.

Knows generations and nothing of HTTP: whether the client is gone and whether the server is closing are asked through
two functions. Invariant: when the stream ends, for whatever reason, none of its generations runs on.
"""

import time
from collections.abc import Callable, Generator, Sequence

from loraserve.engine.generation import Generation
from loraserve.engine.text import Piece
from loraserve.errors import NotReady

POLL_SECONDS = 0.25
"""How long a silent generation is waited for before looking whether the client is still there."""


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def read_all(
    generations: Sequence[Generation], gone: Callable[[], bool], closing: Callable[[], bool]
) -> Generator[tuple[int, Piece]]:
    """Yield (index of the generation, piece) as the pieces come.

    Raises ClientGone within POLL_SECONDS of a disconnect, NotReady when the server is closing, and whatever made a
    generation fail. All generations are cancelled on the way out, also when the iterator is closed early.
    """
    live = dict(enumerate(generations))
    try:
        while live:
            if gone():
                raise ClientGone
            if closing():
                raise NotReady("the server is shutting down")
            silent = True
            timeout = POLL_SECONDS if len(live) == 1 else 0.0
            for index, generation in list(live.items()):
                try:
                    piece = generation.next(timeout)
                except StopIteration:
                    del live[index]
                    silent = False
                    continue
                if piece is not None:
                    silent = False
                    yield index, piece
            if silent and len(live) > 1:
                time.sleep(0.005)
    finally:
        for generation in generations:
            generation.cancel()
