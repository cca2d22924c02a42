"""Text to tokens and back: both kinds of tokenizer, and decoding token by token."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import CheckpointError, InvalidRequest
from tests.conftest import TEXTS, train_sentencepiece

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = "你好世界星abcé  \n,.ñ😀👨\u200d👩\u200d👧𝄞한\ufffd\u0301"
PROMPT = "<|im_start|>user\n你好, who are you? 😀<|im_end|>\n<|im_start|>assistant\n"


def byte_level(folder: Path) -> Path:
    """As MiniMind, Qwen and Llama 3 have it. Without a regex, so that tokens begin and end inside characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<think>", "</think>", "星 星"])
    return save(tokenizer, folder)


def llama_json(folder: Path) -> Path:
    """As Llama 2's `tokenizer.json` has it: a space before every text, byte tokens for what is not in the vocabulary."""
    letters = sorted({character for text in TEXTS for character in text.replace(" ", "▁")} | {"▁"})
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters])
    }
    merges = [("▁", "a"), ("▁", "s"), ("星", "星"), ("你", "好")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return save(tokenizer, folder)


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte-level": byte_level,
    "llama's tokenizer.json": llama_json,
    "sentencepiece": train_sentencepiece,
    "sentencepiece with a space before every text": lambda folder: train_sentencepiece(folder, add_dummy_prefix=True),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / "it"))


@pytest.fixture(scope="module", params=["minimind-3-tokenizer", "minimind2-tokenizer"])
def miniminds(request: pytest.FixtureRequest, conformance: Path) -> Tokenizer:
    return Tokenizer(conformance / request.param)


def in_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


def random_text(rng: random.Random, longest: int = 20) -> str:
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, longest)))


def check_streaming(tokenizer: Tokenizer, alphabet: str, count: int) -> None:
    rng = random.Random(1)
    for _ in range(count):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 20)))
        ids = tokenizer.encode(text)
        pieces = in_pieces(tokenizer, ids)
        assert "".join(pieces) == text == tokenizer.decode(ids)
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_text_comes_back_token_by_token_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(character)) for character in "😀𝄞한"]
    assert max(lengths) >= 3  # else no character is ever in two pieces
    check_streaming(tokenizer, CHARACTERS, 400)


def test_text_comes_back_from_miniminds_tokenizers(miniminds: Tokenizer) -> None:
    check_streaming(miniminds, CHARACTERS, 400)


def test_random_tokens_decode_the_same_in_pieces_and_at_once(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    broken = 0
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 25))]
        pieces = in_pieces(tokenizer, ids)
        whole = tokenizer.decode(ids)
        assert "".join(pieces) == whole
        broken += "\ufffd" in whole
        # What is valid UTF-8 in the tokens' bytes is there, at the beginning less the tokenizer's own space.
        bytes_ = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
        assert whole in (bytes_, bytes_.removeprefix(" "))
    assert broken > 100


def test_decoding_is_the_librarys_wherever_the_bytes_are_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    compared = 0
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 6))]
        ids += tokenizer.encode(random_text(rng, 5).replace("\ufffd", ""))
        whole = tokenizer.decode(ids)
        if "\ufffd" not in whole:  # libraries differ in how many they write for the same bytes
            compared += 1
            assert tokenizer._backend.decode(ids) == whole
    assert compared > 40


def test_all_spaces_before_a_text_go_where_the_vocabulary_removes_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_sentencepiece(tmp_path / "it", add_dummy_prefix=True, remove_extra_whitespaces=True))
    space, hello = tokenizer.token_to_id("▁"), tokenizer.encode("hello")
    assert space is not None and tokenizer.id_to_token(hello[0]).startswith("▁")
    for spaces in range(4):
        ids = [space] * spaces + hello
        assert tokenizer.decode(ids) == tokenizer._backend.decode(ids) == "hello"
        assert tokenizer.decode(hello + ids) == "hello" + " " * (spaces + 1) + "hello"


def test_byte_level_decoding_is_the_librarys_for_any_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path / "it"))
    rng = random.Random(4)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 12))]
        assert tokenizer._backend.decode(ids) == tokenizer.decode(ids)


def test_replacement_character_in_the_text_does_not_hold_up_what_follows(tokenizer: Tokenizer) -> None:
    pieces = in_pieces(tokenizer, tokenizer.encode("a\ufffdb"))
    assert "".join(pieces) == "a\ufffdb"
    assert pieces[-1] == ""


def test_unfinished_character_appears_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a𝄞")
    pieces = in_pieces(tokenizer, ids[:-1])
    assert pieces[-1] == "\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])


def test_markers_become_their_ids_and_are_skipped_in_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    assert [i for i in ids if i < 3] == [1, 2, 1]
    assert tokenizer.token_to_id("<|im_start|>") == 1 and tokenizer.id_to_token(1) == "<|im_start|>"
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.decode([1, *ids, 2]) == tokenizer.decode(ids)
    assert "im_start" not in tokenizer.decode(ids)


def test_space_after_a_marker_is_text(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("a b")
    assert tokenizer.decode([words[0], 2, *words[1:]]) == "a b"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size + 7
    assert tokenizer.decode([*tokenizer.encode("a"), beyond]) == "a"
    assert tokenizer.id_to_token(beyond) == ""
    assert tokenizer.token_to_id("no such token") is None and tokenizer.token_to_id("") is None


def test_half_a_surrogate_pair_is_a_bad_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"'\\ud83d'"):
        tokenizer.encode("a\ud83d")
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_nothing_is_added_to_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert not set(tokenizer.encode("你好")) & {0, 1, 2}


def test_special_tokens_are_read_as_text_or_as_objects(tmp_path: Path) -> None:
    byte_level(tmp_path / "it")
    config = tmp_path / "it" / "tokenizer_config.json"
    config.write_text(
        '{"eos_token": {"content": "<|im_end|>", "special": true}, "bos_token": "<|im_start|>", "pad_token": null}'
    )
    tokenizer = Tokenizer(tmp_path / "it")
    assert tokenizer.eos_ids == {2}
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff not a tokenizer", b'{"model": '])
def test_broken_tokenizer_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_broken_tokenizer_config_is_named(content: str, tmp_path: Path) -> None:
    byte_level(tmp_path / "it")
    (tmp_path / "it" / "tokenizer_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path / "it")


def test_directory_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model.*--tokenizer"):
        Tokenizer(tmp_path)
