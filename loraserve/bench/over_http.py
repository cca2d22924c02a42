"""Any server as a contestant: starts it, and is the load generator that all servers get alike.

Every request is a connection of its own that streams its answer. Prompts are token ids; the answer's ids are read off
its text, for each token that the benchmark's base answers with is two letters (see `models`). Dialects differ in few
points: the paths, the body, where an event has its text, and whether adapters must be announced.

Servers share their cores with it, so while they work it does nothing but note what arrives and when, in one thread
over plain sockets; HTTP and JSON are read when all have answered.
"""

import http.client
import io
import json
import selectors
import socket
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from loraserve.bench.contestant import Answer, Request, arguments, compete
from loraserve.errors import LoraserveError

START_TIMEOUT = 600.0
"""Seconds: vLLM compiles when it meets a model for the first time."""


class Dialect(NamedTuple):
    path: str
    body: Callable[[Request], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]
    ready: str = "/health"
    load: Callable[[str, Path], dict[str, Any]] | None = None
    """The body of /v1/load_lora_adapter, for a server that must be told of an adapter before a request names it."""


def openai_body(request: Request) -> dict[str, Any]:
    return {
        "model": request.adapter or "base",
        "prompt": request.prompt,
        "max_tokens": request.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def openai_text(event: dict[str, Any]) -> str:
    return "".join(choice["text"] or "" for choice in event["choices"])


def llama_body(request: Request) -> dict[str, Any]:
    # A request that names none gets all that the server has.
    adapter = {"id": int(request.adapter[1:]), "scale": 1.0} if request.adapter else {"id": 0, "scale": 0.0}
    return {
        "prompt": request.prompt,
        "n_predict": request.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "lora": [adapter],
    }


DIALECTS = {
    "loraserve": Dialect("/v1/completions", openai_body, openai_text, ready="/ready"),
    "vllm": Dialect(
        "/v1/completions",
        openai_body,
        openai_text,
        load=lambda name, folder: {"lora_name": name, "lora_path": str(folder / name)},
    ),
    "llama": Dialect("/completion", llama_body, lambda event: event["content"]),
}


class Client:
    """Sends requests to a server on this machine, all at once.

    Args:
        vocab: the text of every token -> its id.
        adapters: where they are, for a server that must be told.
    """

    def __init__(self, port: int, dialect: Dialect, vocab: dict[str, int], adapters: Path) -> None:
        self._port = port
        self._dialect = dialect
        self._vocab = vocab
        self._adapters = adapters
        self._loaded: set[str | None] = {None}

    def ask_all(self, requests: list[Request]) -> list[Answer]:
        """Load adapters that the server was not yet told of, then send all requests.

        Raises:
            LoraserveError: the server refused one; the message has its answer.
        """
        new = {request.adapter for request in requests} - self._loaded if self._dialect.load else set()
        if new:
            assert self._dialect.load
            for reply in self._post("/v1/load_lora_adapter", [self._dialect.load(n, self._adapters) for n in new if n]):
                reply.response()
            self._loaded |= new
        bodies = [self._dialect.body(request) for request in requests]
        return [self._read(reply) for reply in self._post(self._dialect.path, bodies)]

    def _post(self, path: str, bodies: list[dict[str, Any]]) -> list["Reply"]:
        """Send all bodies; return what came back, when every connection has ended."""
        replies = []
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            for body in bodies:
                connection = stack.enter_context(socket.socket())
                connection.setblocking(False)
                connection.connect_ex(("127.0.0.1", self._port))  # goes on while others are begun
                replies.append(Reply(connection, _message(path, body)))
                selector.register(connection, selectors.EVENT_WRITE, replies[-1])
            while selector.get_map():
                for key, _ in selector.select():
                    reply: Reply = key.data
                    if reply.unsent:
                        reply.send()
                        if not reply.unsent:
                            selector.modify(key.fileobj, selectors.EVENT_READ, reply)
                    elif not reply.receive():
                        selector.unregister(key.fileobj)
        return replies

    def _read(self, reply: "Reply") -> Answer:
        text, times = "", []
        for line, arrived in reply.lines():
            if line.startswith(b"data: {") and (piece := self._dialect.text(json.loads(line[6:]))):
                times.append(arrived)
                text += piece
        return Answer([self._vocab[text[i : i + 2]] for i in range(0, len(text), 2)], times)


def _message(path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload


@dataclass
class Reply:
    """One request on its connection, and the bytes that came back: `ends[i]` of them had come at `times[i]`."""

    connection: socket.socket
    unsent: bytes
    received: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def send(self) -> None:
        self.unsent = self.unsent[self.connection.send(self.unsent) :]

    def receive(self) -> bool:
        """Take what is there; False when the server has closed the connection."""
        data = self.connection.recv(2**16)
        self.times.append(time.perf_counter())
        self.received += data
        self.ends.append(len(self.received))
        return bool(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` reads a socket by."""
        return io.BufferedReader(io.BytesIO(self.received))

    def response(self) -> http.client.HTTPResponse:
        """Read the head. Raises LoraserveError with the body if its status is not 200."""
        response = http.client.HTTPResponse(cast(socket.socket, self))
        response.begin()
        if response.status != 200:
            body = response.read(500).decode(errors="replace")
            raise LoraserveError(f"the server answered {response.status}: {body}")
        return response

    def lines(self) -> Iterator[tuple[bytes, float]]:
        """The lines of the body, and when each had arrived."""
        response = self.response()
        file = response.fp
        for line in response:
            yield line, self.times[bisect_left(self.ends, file.tell())]


def wait_until_ready(server: "subprocess.Popen[Any]", port: int, path: str, timeout: float) -> None:
    """Return when `path` answers 200. Raises LoraserveError if the server ends before, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection, suppress(OSError):
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.02)
    raise LoraserveError(f"the server did not become ready (exit code {server.poll()}); start it by hand to see why")


def main() -> None:
    args, channel = arguments("a server, driven by stdin")
    server = json.loads(args.server)
    vocab = json.loads((Path(args.base) / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    dialect, port = DIALECTS[server["dialect"]], server["port"]
    with subprocess.Popen(server["command"], stdin=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(process, port, dialect.ready, START_TIMEOUT)
            client = Client(port, dialect, vocab, Path(args.adapters).resolve())
            compete(client.ask_all, channel, version=server["version"], pid=process.pid)
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
