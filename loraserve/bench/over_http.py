"""Any server as a contestant: starts it, and is the load generator that all servers get alike.

Every request is a connection of its own that streams its answer. Prompts are token ids; the answer's ids are read off
its text, for each token that the benchmark's base answers with is two letters (see `models`). Dialects differ in few
points: the paths, the body, where an event has its text, and whether adapters must be announced.
"""

import asyncio
import http.client
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

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
    """Sends requests to a server on this machine, many at once.

    Args:
        vocab: the text of every token -> its id.
        adapters: where they are, for a server that must be told.
    """

    def __init__(self, port: int, dialect: Dialect, vocab: dict[str, int], adapters: Path) -> None:
        self._port = port
        self._dialect = dialect
        self._vocab = vocab
        self._adapters = adapters
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def ask_all(self, requests: list[Request]) -> list[Answer]:
        return await asyncio.gather(*map(self._ask, requests))

    async def _ask(self, request: Request) -> Answer:
        if self._dialect.load and request.adapter:
            if request.adapter not in self._loads:  # the first to name it loads it, others wait
                self._loads[request.adapter] = asyncio.create_task(self._load(request.adapter))
            await self._loads[request.adapter]
        text, times = "", []
        async for line in self._post(self._dialect.path, self._dialect.body(request)):
            if line.startswith(b"data: {") and (piece := self._dialect.text(json.loads(line[6:]))):
                times.append(time.perf_counter())
                text += piece
        return Answer([self._vocab[text[i : i + 2]] for i in range(0, len(text), 2)], times)

    async def _load(self, name: str) -> None:
        assert self._dialect.load
        async for _ in self._post("/v1/load_lora_adapter", self._dialect.load(name, self._adapters)):
            pass

    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield the lines of the answer's body. Raises LoraserveError with the body if its status is not 200."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        try:
            payload = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
            status = int((await reader.readline()).split()[1])
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            rest = b""
            async for data in _chunks(reader) if b"transfer-encoding: chunked" in headers else _blocks(reader):
                *lines, rest = (rest + data).split(b"\n")
                if status != 200:
                    rest = b"\n".join([*lines, rest])
                    continue
                for line in lines:
                    yield line
            if status != 200:
                raise LoraserveError(f"{path} answered {status}: {rest.decode(errors='replace')[:500]}")
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a chunked body."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _blocks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a body that ends with the connection."""
    while data := await reader.read(2**16):
        yield data


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
            with asyncio.Runner() as runner:
                compete(
                    lambda requests: runner.run(client.ask_all(requests)),
                    channel,
                    version=server["version"],
                    pid=process.pid,
                )
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
