"""The server as clients meet it: waitress on loopback, the stock openai client, raw sockets, many at once."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from loraserve.base.load import Base
from loraserve.engine.service import Service
from loraserve.errors import LoraserveError
from loraserve.server import Server, create_app
from tests.server.conftest import CHAINS, Live, text_of, write_adapter

USER: Any = [{"role": "user", "content": "Who are you?"}]
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def eventually(check: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.01)
    return False


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


class TestOpenAIClient:
    """The stock client, pointed at the server."""

    def test_chats_with_an_adapter_as_the_model(self, live: Live) -> None:
        answer = live.client.chat.completions.create(model="pirate", messages=USER)
        assert answer.choices[0].message.content == text_of("pirate")
        assert answer.model_extra == {"adapter": "pirate"}
        assert answer.usage is not None and answer.usage.completion_tokens == len(CHAINS["pirate"])

    def test_chats_with_a_blend_as_an_extra_field(self, live: Live) -> None:
        blend = {"adapter": [{"name": "poet", "scale": 0.7}, {"name": "pirate", "scale": 0.3}]}
        answer = live.client.chat.completions.create(model="tiny", messages=USER, extra_body=blend)
        assert answer.choices[0].message.content == text_of("poet")

    def test_streams(self, live: Live) -> None:
        options: Any = {"include_usage": True}
        stream = live.client.chat.completions.create(model="poet", messages=USER, stream=True, stream_options=options)
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of("poet")
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage is not None

    def test_completes_and_lists_models(self, live: Live) -> None:
        completion = live.client.completions.create(model="tiny", prompt="\n", n=2, logprobs=1)
        assert [choice.text for choice in completion.choices] == [text_of("base")] * 2
        assert {"tiny", "pirate"} <= {model.id for model in live.client.models.list()}
        assert live.client.models.retrieve("pirate").id == "pirate"

    def test_calls_tools(self, live: Live) -> None:
        answer = live.client.chat.completions.create(model="caller", messages=USER, tools=[WEATHER])
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Paris"}
        with live.client.chat.completions.stream(model="caller", messages=USER, tools=[WEATHER]) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"

    def test_raises_its_own_errors(self, live: Live) -> None:
        with pytest.raises(openai.NotFoundError, match="did you mean 'pirate'") as missing:
            live.client.chat.completions.create(model="priate", messages=USER)
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            live.client.chat.completions.create(model="tiny", messages=USER, max_tokens=-1)
        assert bad.value.param == "max_tokens"

    def test_sees_a_failure_in_mid_stream_as_an_error(
        self, make_service: Callable[..., Service], request: pytest.FixtureRequest
    ) -> None:
        service = make_service()
        live = Live(create_app(service))
        request.addfinalizer(live.close)
        stream = live.client.chat.completions.create(model="forever", messages=USER, stream=True)
        next(iter(stream))
        service.stop()
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)


@pytest.fixture
def crowded(make_service: Callable[..., Service]) -> Iterator[tuple[Live, Service]]:
    service = make_service(max_num_seqs=2, max_queue=32)
    live = Live(create_app(service))
    yield live, service
    live.close()


def test_closing_while_another_thread_wakes_the_server_is_no_error(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop, woken by somebody else, must not close the pipe that `close` is about to write to."""
    live = Live(create_app(make_service()))
    trigger = live.server._server.trigger
    write = trigger._physical_pull

    def write_late() -> None:
        write()  # another thread's
        time.sleep(0.2)
        write()

    monkeypatch.setattr(trigger, "_physical_pull", write_late)
    live.close()
    assert not live._thread.is_alive()


def test_a_hundred_clients_at_once_get_an_answer_or_429(crowded: tuple[Live, Service]) -> None:
    live, _ = crowded
    body = {"messages": USER, "adapter": "forever", "max_tokens": 200}
    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(lambda _: post(f"{live.url}/v1/chat/completions", body), range(100)))
    statuses = [status for status, _, _ in results]
    assert set(statuses) == {200, 429}, "some are answered and some sent away"
    assert statuses.count(200) >= 2 + 32, "nobody is sent away while there is room"
    for status, answer, headers in results:
        if status == 200:
            assert answer["usage"]["completion_tokens"] == 200
        else:
            assert answer["error"]["code"] == "queue_full" and answer["error"]["type"] == "rate_limit_error"
            assert int(headers["Retry-After"]) >= 1
    status, answer, _ = post(f"{live.url}/v1/chat/completions", {"messages": USER, "adapter": "pirate"})
    assert status == 200 and answer["choices"][0]["message"]["content"] == text_of("pirate")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(crowded: tuple[Live, Service], stream: bool) -> None:
    live, service = crowded
    body = json.dumps({"messages": USER, "adapter": "forever", "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    clients = []
    for number in range(5):
        clients.append(socket.create_connection(("127.0.0.1", live.server.port), timeout=30))
        clients[-1].sendall(head.encode() + b"\r\n\r\n" + body)
        if stream and number == 0:  # before the others come, for only two run and the rest wait in silence
            assert clients[0].recv(4096).startswith(b"HTTP/1.1 200")

    def in_flight() -> int:
        stats = service.stats()
        return stats["requests_running"] + stats["requests_waiting"]

    assert eventually(lambda: in_flight() == 5, 10), service.stats()
    for client in clients:
        client.close()
    assert eventually(lambda: in_flight() == 0, 1), "within a second: two were running and three were queued"
    status, answer, _ = post(f"{live.url}/v1/chat/completions", {"messages": USER, "adapter": "pirate"})
    assert status == 200 and answer["choices"][0]["message"]["content"] == text_of("pirate")


def test_streams_arrive_while_they_are_made(live: Live) -> None:
    stream = live.client.chat.completions.create(model="forever", messages=USER, stream=True)
    seen = [chunk.choices[0].delta.content for chunk, _ in zip(stream, range(20), strict=False)]
    stream.close()
    assert "".join(text or "" for text in seen).startswith("la-la~"), "an endless answer has been read in part"


def test_what_waitress_refuses_has_the_same_shape(live: Live) -> None:
    def raw(request: bytes) -> tuple[int, Any]:
        with socket.create_connection(("127.0.0.1", live.server.port)) as client:
            client.sendall(request)
            response = http.client.HTTPResponse(client)
            response.begin()
            return response.status, json.loads(response.read())

    huge = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    status, body = raw(huge)
    assert status == 413 and body["error"]["code"] == "request_entity_too_large"
    status, body = raw(b"GARBAGE\r\n\r\n")
    assert status == 400 and body["error"]["type"] == "invalid_request_error"
    status, body = raw(b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\n\r\n")
    assert status == 431 and body["error"]["message"]


def test_a_chunked_body_is_read(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.server.port)
    parts = iter([b'{"messages": [{"role": "user",', b' "content": "hi"}]}'])
    connection.request("POST", "/v1/chat/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 200 and json.load(response)["adapter"] == "base"
    connection.close()


def test_metrics_count_requests_and_tokens_by_adapter(live: Live) -> None:
    post(f"{live.url}/v1/chat/completions", {"messages": USER, "adapter": "pirate"})
    post(f"{live.url}/v1/chat/completions", {"messages": USER, "adapter": "pirate:0.6+poet:0.4"})
    post(f"{live.url}/v1/chat/completions", {"messages": USER, "n": 0})
    lines: dict[str, str] = {}
    deadline = time.monotonic() + 10
    while not any('status="400"' in line for line in lines):  # counted when the answer has been sent
        assert time.monotonic() < deadline, lines
        with urllib.request.urlopen(f"{live.url}/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            text = response.read().decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    route = 'method="POST",route="/v1/chat/completions"'
    assert float(lines[f'loraserve_requests_total{{{route},status="200"}}']) == 2
    assert float(lines[f'loraserve_requests_total{{{route},status="400"}}']) == 1
    assert float(lines['loraserve_generation_tokens_total{adapter="pirate"}']) == len(CHAINS["pirate"])
    assert float(lines['loraserve_generation_tokens_total{adapter="blend"}']) == len(CHAINS["pirate"])
    assert float(lines["loraserve_time_to_first_token_seconds_count"]) == 2
    assert float(lines["loraserve_engine_ready"]) == 1 and float(lines["loraserve_engine_requests_total"]) >= 2


def test_closing_ends_streams_with_an_error(make_service: Callable[..., Service]) -> None:
    live = Live(create_app(make_service()))
    stream = live.client.chat.completions.create(model="forever", messages=USER, stream=True)
    next(iter(stream))
    closer = threading.Thread(target=live.server.close)
    closer.start()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    closer.join()
    with pytest.raises(openai.APIConnectionError):
        live.client.models.list()
    live.client.close()


def test_a_taken_port_is_a_clear_error(live: Live) -> None:
    with pytest.raises(LoraserveError, match=f"cannot listen on 127.0.0.1:{live.server.port} .*--port"):
        Server(live.app, "127.0.0.1", live.server.port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(base: Base, tmp_path: Path, number: signal.Signals) -> None:
    for name in ("pirate", "poet"):
        write_adapter(tmp_path / name, base, CHAINS[name][0])
    command = [
        sys.executable,
        "-m",
        "loraserve",
        "serve",
        "--base",
        str(base.path),
        "--adapters-dir",
        str(tmp_path),
    ]
    command += ["--port", "0", "--default-adapter", "poet", "--max-model-len", "64", "--kv_memory", "1M"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving tiny with 2 adapters (pirate, poet) at http://127.0.0.1:"), line
        url = line.split(" at ")[1].split()[0]
        status, answer, _ = post(f"{url}/v1/chat/completions", {"messages": USER})
        assert status == 200 and answer["choices"][0]["message"]["content"] == text_of("poet")
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and rest == ""
