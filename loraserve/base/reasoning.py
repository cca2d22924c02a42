"""Split a streamed answer into reasoning and content at `<think>` and `</think>`, wherever its pieces are cut."""

OPEN, CLOSE = "<think>", "</think>"


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `marker`, without being all of it."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


class ReasoningSplitter:
    """Feed the pieces of one answer, get (reasoning, content) deltas.

    Only a `<think>` that begins the answer opens reasoning; line breaks beside the markers belong to the template and
    are dropped.

    Args:
        inside: the prompt already ended in `<think>` (MiniMind's `open_thinking`), so the answer starts in reasoning.
    """

    def __init__(self, inside: bool = False) -> None:
        self._state = "inside" if inside else "start"
        self._held = ""  # not yet certain what it is
        self._trim = inside  # line breaks at the beginning are the template's

    def push(self, text: str) -> tuple[str, str]:
        """Add a piece; return the new reasoning text and the new content text."""
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if OPEN.startswith(begun) and begun != OPEN:
                return "", ""
            self._state = "inside" if begun.startswith(OPEN) else "content"
            if self._state == "inside":
                self._held, self._trim = begun[len(OPEN) :], True
        reasoning = self._take_reasoning() if self._state == "inside" else ""
        content = self._take(len(self._held)) if self._state == "content" else ""
        return reasoning, content

    def flush(self) -> tuple[str, str]:
        """Return what was held back, at the end of the answer."""
        rest = self._take(len(self._held))
        return (rest, "") if self._state == "inside" else ("", rest)

    def _take_reasoning(self) -> str:
        end = self._held.find(CLOSE)
        if end >= 0:
            text = self._take(end).rstrip("\n")
            self._held = self._held[len(CLOSE) :]
            self._state, self._trim = "content", True
            return text
        certain = self._held[: len(self._held) - overlap(self._held, CLOSE)]
        return self._take(len(certain.rstrip("\n")))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text
