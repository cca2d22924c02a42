"""The load generator: token ids, their times and refusals, however a server frames and splits what it sends."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraserve.bench.contestant import Answer, Request
from loraserve.bench.over_http import DIALECTS, Client
from loraserve.errors import LoraserveError

VOCAB = {"ab": 1, "cd": 2, "ef": 3}
OK = b"HTTP/1.1 200 OK\r\n"
PAUSE = 0.05


@contextmanager
def server(answer: Callable[[str, dict[str, Any]], list[bytes]]) -> Iterator[int]:
    """Give what `answer` says to a path and a body in pieces with pauses, then close; yields the port."""

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            path = file.readline().split()[1].decode()
            length = 0
            while (line := file.readline().strip().lower()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line.split()[1])
            for i, piece in enumerate(answer(path, json.loads(file.read(length)))):
                time.sleep(PAUSE if i else 0.0)
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                connection = listener.accept()[0]
                if over.is_set():
                    connection.close()
                    return
                threading.Thread(target=talk, args=(connection,)).start()

        over = threading.Event()
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def event(dialect: str, text: str) -> bytes:
    said = {"content": text} if dialect == "llama" else {"choices": [{"text": text}]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_an_answer_is_read_as_it_arrived(dialect: str, chunked: bool, tmp_path: Path) -> None:
    """Two events in one piece, one event in two pieces, events without text, `[DONE]`: all do occur."""
    one, two, three, none = (event(dialect, text) for text in ("ab", "cd", "ef", ""))
    head = OK + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n")
    frame = chunk if chunked else bytes
    last = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n" if chunked else b"data: [DONE]\n\n"
    split = frame(three)
    pieces = [head, frame(one) + frame(two), split[:12], split[12:], frame(none) + last]

    def answer(path: str, body: dict[str, Any]) -> list[bytes]:
        return [OK + b"Content-Length: 7\r\n\r\nSuccess"] if path.endswith("lora_adapter") else pieces

    with server(answer) as port:
        client = Client(port, DIALECTS[dialect], VOCAB, tmp_path)
        before = time.perf_counter()
        for found in client.ask_all([Request([5], 3, "a0"), Request([6], 3, None)]):
            assert found.token_ids == [1, 2, 3]
            first, second, third = found.times
            assert first == second < third - 1.5 * PAUSE, "the third came with the piece after the next"
            assert before + 0.5 * PAUSE < first < time.perf_counter() - 2 * PAUSE


@pytest.mark.parametrize(
    ("dialect", "of_adapter", "of_base"),
    [
        ("loraserve", {"model": "a3"}, {"model": "base"}),
        ("vllm", {"model": "a3"}, {"model": "base"}),
        ("llama", {"lora": [{"id": 3, "scale": 1.0}]}, {"lora": [{"id": 0, "scale": 0.0}]}),
    ],
)
def test_a_request_names_its_adapter(
    dialect: str, of_adapter: dict[str, Any], of_base: dict[str, Any], tmp_path: Path
) -> None:
    """A llama-server would apply every adapter to a request that names none."""
    asked: dict[str, list[dict[str, Any]]] = {}

    def answer(path: str, body: dict[str, Any]) -> list[bytes]:
        asked.setdefault(path, []).append(body)
        return [OK + b"\r\n" + event(dialect, "ab")]

    with server(answer) as port:
        client = Client(port, DIALECTS[dialect], VOCAB, tmp_path)
        for _ in range(2):
            assert client.ask_all([Request([5], 1, "a3"), Request([6], 1, None)])[0].token_ids == [1]
    assert len(asked.get("/v1/load_lora_adapter", [])) == (dialect == "vllm"), "once, and only where it is needed"
    bodies = asked[DIALECTS[dialect].path]
    assert len(bodies) == 4
    for body in bodies:
        wanted = of_adapter if body["prompt"] == [5] else of_base
        assert {key: body[key] for key in wanted} == wanted


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/completions"])
def test_a_refusal_is_an_error_with_the_servers_words(path: str, tmp_path: Path) -> None:
    def answer(asked: str, body: dict[str, Any]) -> list[bytes]:
        status = b"HTTP/1.1 404 Not Found\r\n\r\nno such adapter" if asked == path else OK + b"\r\n"
        return [status]

    with server(answer) as port, pytest.raises(LoraserveError, match="404: no such adapter"):
        Client(port, DIALECTS["vllm"], VOCAB, tmp_path).ask_all([Request([5], 1, "a0")])


def test_hundreds_of_clients_are_answered_each_with_its_own(tmp_path: Path) -> None:
    names = list(VOCAB)

    def answer(path: str, body: dict[str, Any]) -> list[bytes]:
        return [OK + b"\r\n" + event("loraserve", names[body["prompt"][0] % 3])]

    with server(answer) as port:
        answers: list[Answer] = Client(port, DIALECTS["loraserve"], VOCAB, tmp_path).ask_all(
            [Request([i] * 500, 1, None) for i in range(256)]
        )
    assert [answer.token_ids for answer in answers] == [[i % 3 + 1] for i in range(256)]
