"""The exception tree. Every error a user can cause is a `LoraserveError` whose text says what, where and the fix.

Knows no HTTP: the server maps classes to status codes in one table, the command line prints the text on one line.
"""

import difflib
from bisect import bisect_left
from collections.abc import Iterable

LONGEST_NAME = 200
MAX_COMPARED = 400


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x' or 'y'?` with what in `known` is closest to `name`; '' if nothing is close."""
    names = list(known)
    if len(names) > MAX_COMPARED:  # its neighbours in the alphabet, for comparing with all would take seconds
        names.sort()
        start = max(bisect_left(names, name) - MAX_COMPARED // 2, 0)
        names = names[start : start + MAX_COMPARED]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


class LoraserveError(Exception):
    """Base of all errors with a message meant for the user.

    `code` is a stable machine-readable word; `param` names the offending request field or option, if there is one.
    """

    code = "error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(LoraserveError):
    """A field has the wrong type, an impossible value, or contradicts another."""

    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together do not fit the model's context."""

    code = "context_length_exceeded"


class NotFound(LoraserveError):
    """Something named does not exist; the message carries close matches."""

    code = "not_found"
    kind = "item"

    def __init__(self, name: str, known: Iterable[str] = (), *, param: str | None = None, hint: str = "") -> None:
        name = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…"  # echoing megabytes helps nobody
        parts = (f"no {self.kind} named {name!r}", did_you_mean(name, known), hint)
        super().__init__("; ".join(filter(None, parts)), param=param)


class AdapterNotFound(NotFound):
    code = "adapter_not_found"
    kind = "adapter"


class ModelNotFound(NotFound):
    code = "model_not_found"
    kind = "model"


class VersionNotFound(NotFound):
    code = "version_not_found"
    kind = "version"


class Conflict(LoraserveError):
    """The request contradicts the present state: the name exists, the adapter is in use, another run holds the lock."""

    code = "conflict"


class AdapterRefused(LoraserveError):
    """An adapter that would do nothing, or the wrong thing. `problems` lists everything that is wrong with it."""

    code = "adapter_refused"

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__(f"adapter {name!r} refused: " + "; ".join(problems))
        self.problems = problems


class CheckpointError(LoraserveError):
    """A base, tokenizer or adapter file that cannot be read, or whose contents do not fit together."""

    code = "bad_checkpoint"


class DataError(LoraserveError):
    """A training file with rows that cannot be used; the message names lines and reasons."""

    code = "bad_data"


class TrainingFailed(LoraserveError):
    """The loss or its gradient is no longer a number. Nothing was published."""

    code = "training_failed"


class NotBetter(LoraserveError):
    """A trained adapter is not better than the base on validation and was not published; its state is saved."""

    code = "not_better"


class TrainingInterrupted(LoraserveError):
    """A signal stopped a training run; its state is saved and the message says how to go on."""

    code = "interrupted"


class ProcessLost(LoraserveError):
    """Another process of the same training run ended without a word, or cannot be reached."""

    code = "process_lost"


class PeerFailed(LoraserveError):
    """Another process of the same training run has said why it ends; this one ends, too, and says nothing."""

    code = "peer_failed"


class StorageError(LoraserveError):
    """Writing failed (disk full, no permission). What was there before is still there."""

    code = "storage"


class HubError(LoraserveError):
    """The Hugging Face hub cannot be reached, or does not let us have what was asked for."""

    code = "hub"


class QueueFull(LoraserveError):
    """No room for another request now. `retry_after` is in seconds."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFinite(LoraserveError):
    """The logits of one request are no longer numbers; the others go on."""

    code = "not_finite"

    def __init__(self) -> None:
        super().__init__(
            "the model's output is no longer a number: an adapter's weight is too large, or the base overflows in "
            "float16; lower the weight in the SPEC, or serve with --dtype float32"
        )


class NotReady(LoraserveError):
    """The engine is starting, stopping, or its step crashed."""

    code = "not_ready"
