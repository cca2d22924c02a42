"""Text to token ids and back, for `tokenizer.json` (library tokenizers) and `tokenizer.model` (sentencepiece).

Both encode exactly what they are given: markers such as `<|im_start|>` in the text become their ids, nothing is added.
"""

import json
import re
from pathlib import Path
from typing import Any, Protocol

from loraserve.errors import CheckpointError

REPLACEMENT = "\ufffd"


class _Backend(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str: ...


class _TokenizersBackend:
    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""


class _SentencePieceBackend:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load(str(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read as a sentencepiece model ({error})") from None
        self.vocab_size = self._model.get_piece_size()
        # Control pieces are never produced from text by sentencepiece itself, so they are cut out first.
        controls = [i for i in range(self.vocab_size) if self._model.is_control(i)]
        self._controls = {self._model.id_to_piece(i): i for i in controls}
        self._splitter = re.compile("(" + "|".join(map(re.escape, self._controls)) + ")") if controls else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text) if self._splitter else [text]:
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i < self.vocab_size])

    def token_to_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() and token != self._model.id_to_piece(token_id) else token_id

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id) if token_id < self.vocab_size else ""


class Tokenizer:
    """The tokenizer in a directory, with its special tokens and chat template source.

    Args:
        path: a directory with `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`.

    Raises:
        CheckpointError: no tokenizer there, or one that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._backend: _Backend
        if (path / "tokenizer.json").exists():
            self._backend = _TokenizersBackend(path / "tokenizer.json")
        elif (path / "tokenizer.model").exists():
            self._backend = _SentencePieceBackend(path / "tokenizer.model")
        else:
            raise CheckpointError(
                f"no tokenizer.json or tokenizer.model in {path}; give the tokenizer's directory with --tokenizer"
            )
        config = path / "tokenizer_config.json"
        try:
            self.config: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.exists() else {}
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{config} is not valid JSON ({error})") from None
        self.vocab_size = self._backend.vocab_size
        self.special_tokens = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := self.config.get(name))
        }
        eos = self.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_ids: set[int] = set() if eos is None else {eos}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, special tokens recognised, none added."""
        return self._backend.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids))

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token) if token else None

    def id_to_token(self, token_id: int) -> str:
        """Return the vocabulary's own spelling of a token, '' for an id beyond it."""
        return self._backend.id_to_token(token_id)

    def stream(self) -> "Detokenizer":
        """Start decoding a sequence token by token."""
        return Detokenizer(self)


class Detokenizer:
    """Decodes one sequence as it grows and never hands out half a character.

    The concatenated pieces equal `Tokenizer.decode` of all ids. A token's text can depend on its neighbours (byte
    fallback, leading spaces), so a short window before the new token is decoded with and without it.
    """

    MAX_PENDING = 4
    """A character has at most 4 bytes and a token at least 1, so more than 4 undecodable tokens are no beginning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # start of the window
        self._read = 0  # ids before this one are handed out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, often ''."""
        self._ids.append(token_id)
        text = self._pending(len(self._ids))
        if text and not text.endswith(REPLACEMENT):
            return self._hand_out(text, len(self._ids))
        if len(self._ids) - self._read > self.MAX_PENDING:
            certain = len(self._ids) - self.MAX_PENDING + 1
            return self._hand_out(self._pending(certain), certain)
        return ""

    def flush(self) -> str:
        """Return what is left at the end of the sequence, with U+FFFD for an unfinished character."""
        return self._hand_out(self._pending(len(self._ids)), len(self._ids))

    def _pending(self, end: int) -> str:
        decode = self._tokenizer.decode
        known = decode(self._ids[self._prefix : self._read])
        return decode(self._ids[self._prefix : end])[len(known) :]

    def _hand_out(self, text: str, end: int) -> str:
        self._prefix, self._read = self._read, end
        return text
