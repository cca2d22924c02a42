"""Text to token ids and back, for `tokenizer.json` (library tokenizers) and `tokenizer.model` (sentencepiece).

Both encode exactly what they are given: markers such as `<|im_start|>` in the text become their ids, nothing is added.
Both decode byte by byte: every token stands for some bytes, and the text is those bytes as UTF-8. So text that grows
token by token is the text of the whole, whatever the tokens are.
"""

import codecs
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from loraserve.errors import CheckpointError, InvalidRequest


class _Backend(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str:
        """The library's own decoding, special tokens skipped."""

    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str: ...
    def is_special(self, token_id: int) -> bool:
        """Whether decoding skips it, as it does ids beyond the vocabulary."""

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that need not be whole characters; None for a token that is text."""


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


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
        added = self._model.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        decoder = json.loads(self._model.decoder.__getstate__()) if self._model.decoder else {}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder] if decoder else [])}
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._falls_back = "ByteFallback" in kinds

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special or self._model.id_to_token(token_id) is None

    def raw_bytes(self, token_id: int) -> bytes | None:
        token = self.id_to_token(token_id)
        if self._alphabet is not None:
            known = all(character in self._alphabet for character in token)  # else an added token, spelled as it is
            return bytes(self._alphabet[character] for character in token) if known else token.encode()
        match = _FALLBACK_BYTE.fullmatch(token) if self._falls_back else None
        return bytes([int(match[1], 16)]) if match else None


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
        return self._model.decode([i for i in ids if not self.is_special(i)])

    def token_to_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() and token != self._model.id_to_piece(token_id) else token_id

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id) if token_id < self.vocab_size else ""

    def is_special(self, token_id: int) -> bool:
        return token_id >= self.vocab_size or self._model.is_control(token_id)

    def raw_bytes(self, token_id: int) -> bytes | None:
        if not self._model.is_byte(token_id):
            return None
        return bytes([int(self._model.id_to_piece(token_id)[3:5], 16)])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or hostile JSON
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; fetch the file again")
    return config


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
            self.file = path / "tokenizer.json"
            self._backend = _TokenizersBackend(self.file)
        elif (path / "tokenizer.model").exists():
            self.file = path / "tokenizer.model"
            self._backend = _SentencePieceBackend(self.file)
        else:
            raise CheckpointError(
                f"no tokenizer.json or tokenizer.model in {path}; give the tokenizer's directory with --tokenizer"
            )
        self.config = _read_config(path / "tokenizer_config.json")
        self.vocab_size = self._backend.vocab_size
        self.special_tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self.config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                self.special_tokens[name] = value
        self._bytes: dict[int, bytes] = {}
        eos = self.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_ids: set[int] = set() if eos is None else {eos}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, special tokens recognised, none added.

        Raises:
            InvalidRequest: the text holds half a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text holds {text[error.start]!r}, half of a surrogate pair; remove it") from None
        return self._backend.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token) if token else None

    def id_to_token(self, token_id: int) -> str:
        """Return the vocabulary's own spelling of a token, '' for an id beyond it."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest spelling: no token stands for more of a text."""
        return max(len(self.id_to_token(i)) for i in range(self.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text that has begun: perhaps part of a character, b'' for a special token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if self._backend.is_special(token_id):
            return b""
        raw = self._backend.raw_bytes(token_id)
        if raw is not None:
            return raw
        before = self._backend.decode([self._anchor])
        return self._backend.decode([self._anchor, token_id])[len(before) :].encode()

    @cached_property
    def _anchor(self) -> int:
        """A token after which any other one is in the middle of a text."""
        return next(i for i in range(self.vocab_size) if self._backend.decode([i]).isalnum())

    def begins(self, ids: list[int]) -> str | None:
        """Return what tokens at the very beginning of a text, none of them special, say there; None for raw bytes.

        A vocabulary that puts a space before every text takes it off again when decoding.
        """
        return None if self._backend.raw_bytes(ids[-1]) is not None else self._backend.decode(ids)

    def stream(self) -> "Detokenizer":
        """Start decoding a sequence token by token."""
        return Detokenizer(self)


class Detokenizer:
    """Decodes one sequence as it grows and never hands out half a character.

    The concatenated pieces are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._beginning: list[int] | None = []  # the tokens so far, while they have no text

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, often ''."""
        added = self._tokenizer.token_bytes(token_id)
        if self._beginning is not None and added:
            self._beginning.append(token_id)
            text = self._tokenizer.begins(self._beginning)
            if text == "":
                return ""
            self._beginning = None
            if text is not None:
                return text
        return self._utf8.decode(added)

    def flush(self) -> str:
        """Return what is left at the end of the sequence, U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
