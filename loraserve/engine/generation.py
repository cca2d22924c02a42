"""One answer as its caller sees it: pieces of text, read from the queue that the engine's thread fills."""

import queue
from collections.abc import Iterator

from loraserve.engine.engine import Event
from loraserve.engine.sequence import Sequence, Token
from loraserve.engine.text import Piece, TextStream
from loraserve.engine.worker import Worker
from loraserve.errors import LoraserveError


class Generation:
    """One answer on its way. Iterating yields Pieces until the one with a finish reason.

    A failure of the request is raised from the iteration as a LoraserveError.
    """

    def __init__(
        self, worker: Worker, sequence: Sequence, outbox: "queue.SimpleQueue[Event]", text: TextStream
    ) -> None:
        self.prompt_tokens = len(sequence.prompt_token_ids)
        self.completion_tokens = 0
        self._worker = worker
        self._sequence = sequence
        self._outbox = outbox
        self._text = text
        self._done = False
        self._failure: LoraserveError | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that did not have to be computed; known with the first token of the answer."""
        return self._sequence.num_shared

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = self.next()
        assert piece is not None
        return piece

    def next(self, timeout: float | None = None) -> Piece | None:
        """Return the next Piece, made of every token that has arrived; None if none arrives in `timeout` seconds.

        Raises:
            StopIteration: the answer is complete or was cancelled.
            LoraserveError: the request or the engine failed.
        """
        if self._failure is not None:
            self._done, failure, self._failure = True, self._failure, None
            raise failure
        if self._done:
            raise StopIteration
        try:
            events = [self._outbox.get(timeout=timeout)]
        except queue.Empty:
            return None
        while not self._outbox.empty():
            events.append(self._outbox.get())
        self._failure = next((event for event in events if isinstance(event, LoraserveError)), None)
        tokens = [event for event in events if isinstance(event, Token) and event.finish_reason != "abort"]
        if not tokens and (self._done or self._failure is not None):
            return self.next(timeout)  # raises
        piece = self._text.push(tokens)
        self.completion_tokens += len(piece.token_ids)
        if piece.finish_reason:
            self.cancel()  # a stop string ends the answer before the engine knows
        return piece

    def cancel(self) -> None:
        """Stop generating and free the slot before the next step. Idempotent, callable from any thread."""
        self._done, self._failure = True, None  # whatever failed since then concerns nobody
        self._worker.abort(self._sequence)
        self._outbox.put(Token(-1, "abort"))  # wakes a thread that waits in `next`
