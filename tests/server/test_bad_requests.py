"""Bad input: each gets a clear error of the right kind in OpenAI's shape, and the next good request is answered."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from loraserve.engine.service import Service
from loraserve.server import create_app
from tests.server.conftest import text_of

USER = [{"role": "user", "content": "Who are you?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def expect(response: TestResponse, status: int, code: str, param: str | None, *words: str) -> dict[str, Any]:
    """Check an error response: status, OpenAI's shape, the field that is at fault, and words of its message."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    error = response.json["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert (error["code"], error["param"]) == (code, param), error
    for word in words:
        assert word in error["message"], error["message"]
    return error


@pytest.fixture(autouse=True)
def the_next_good_request_is_answered(client: FlaskClient) -> Iterator[None]:
    yield
    answer = client.post(CHAT, json={"messages": USER, "adapter": "pirate"}).json
    assert answer["choices"][0]["message"]["content"] == text_of("pirate")


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"messages": "hello"}, "messages", "array"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'wizard'"),
        ({"messages": [*USER, {"role": "user", "content": 3}]}, "messages[1].content", "string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [42]}, "messages[0]", "42"),
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": "5"}, "max_tokens", "'5'"),
        ({"max_tokens": 2.5}, "max_tokens", "2.5"),
        ({"max_tokens": True}, "max_tokens", "True"),
        ({"temperature": -1}, "temperature", "between"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "between"),
        ({"min_p": 2}, "min_p", "between"),
        ({"frequency_penalty": 3}, "frequency_penalty", "between"),
        ({"n": 0}, "n", "greater"),
        ({"n": 129}, "n", "128"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"stop": 7}, "stop", "strings"),
        ({"stop": [""]}, "stop", "empty"),
        ({"seed": "x"}, "seed", "'x'"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "string"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"adapter": 5}, "adapter", "SPEC"),
        ({"adapter": "a:b"}, "adapter", "number"),
        ({"adapter": "../../etc"}, "adapter", "cannot name"),
        ({"adapter": [{"name": "pirate", "scale": "1"}]}, "adapter[0].scale", "number"),
        ({"adapter": [{"name": "pirate"}, {"scale": 1}]}, "adapter[1]", "name"),
        ({"adapter": [{"name": "pirate", "scale": 10**400}]}, "adapter[0].scale", "number"),
        ({"adapter": "+".join(f"a{i}" for i in range(40))}, "adapter", "40"),
        ({"model": "pirate", "adapter": "poet"}, "adapter", "different"),
        ({"model": "tiny:pirate", "adapter": "pirate:0.5"}, "adapter", "different"),
        ({"model": 4}, "model", "4"),
    ],
)
def test_a_wrong_field_is_named(client: FlaskClient, fields: dict[str, Any], param: str, word: str) -> None:
    expect(client.post(CHAT, json={"messages": USER, **fields}), 400, "invalid_request", param, word)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, 10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_completion_field_is_named(client: FlaskClient, fields: dict[str, Any], param: str) -> None:
    expect(client.post(TEXT, json=fields), 400, "invalid_request", param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client: FlaskClient, number: str) -> None:
    for field, param in (
        ('"temperature": %s', "temperature"),
        ('"adapter": [{"name": "pirate", "scale": %s}]', "adapter"),
    ):
        body = '{"messages": [{"role": "user", "content": "hi"}], ' + field % number + "}"
        response = client.post(CHAT, data=body, content_type="application/json")
        error = expect(response, 400, "invalid_request", response.json["error"]["param"])
        assert error["param"].startswith(param)
    expect(
        client.post(CHAT, json={"messages": USER, "adapter": "pirate:nan"}), 400, "invalid_request", "adapter", "nan"
    )


@pytest.mark.parametrize(
    "body", [b"", b"{", b"hello", b'{"messages": [}', b"\xff\xfe", b'{"a": "\\ud800"}', b"[" * 5000]
)
def test_json_that_is_not_json(client: FlaskClient, body: bytes) -> None:
    expect(client.post(CHAT, data=body, content_type="application/json"), 400, "invalid_request", None, "not JSON")


@pytest.mark.parametrize("body", ["[]", "null", '"text"', "5"])
def test_json_that_is_no_object(client: FlaskClient, body: str) -> None:
    expect(client.post(CHAT, data=body, content_type="application/json"), 400, "invalid_request", None, "JSON object")


def test_all_wrong_fields_are_told_at_once(client: FlaskClient) -> None:
    response = client.post(CHAT, json={"messages": USER, "n": "2", "seed": "x", "stream": 3})
    expect(response, 400, "invalid_request", "stream", "n: ", "seed: ", "stream: ")


def test_another_content_type_is_refused(client: FlaskClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        response = client.post(CHAT, data=b'{"messages": []}', content_type=kind)
        expect(response, 415, "unsupported_media_type", None, "application/json")


def test_a_body_too_large_is_refused(service: Service) -> None:
    client = create_app(service, max_body_bytes=1000).test_client()
    messages = [{"role": "user", "content": "x" * 2000}]
    expect(client.post(CHAT, json={"messages": messages}), 413, "request_entity_too_large", None)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "priate"}, "model_not_found", "model"),
        ({"model": "tiny:priate"}, "model_not_found", "model"),
        ({"adapter": "priate"}, "adapter_not_found", "adapter"),
        ({"adapter": "poet:0.5+priate:0.5"}, "adapter_not_found", "adapter"),
    ],
)
def test_an_unknown_name_is_answered_with_close_matches(
    client: FlaskClient, fields: dict[str, Any], code: str, param: str
) -> None:
    expect(client.post(CHAT, json={"messages": USER, **fields}), 404, code, param, "did you mean 'pirate'?")


@pytest.mark.parametrize("model", ["gpt-4o", "org/model", "../../etc/passwd", "a b"])
def test_an_unknown_model_is_not_found(client: FlaskClient, model: str) -> None:
    expect(client.post(CHAT, json={"messages": USER, "model": model}), 404, "model_not_found", "model")


def test_a_prompt_or_answer_beyond_the_context(make_service: Callable[..., Service]) -> None:
    client = create_app(make_service(max_model_len=64)).test_client()
    long = [{"role": "user", "content": "word " * 40}]
    expect(client.post(CHAT, json={"messages": long}), 400, "context_length_exceeded", "messages", "64 tokens")
    expect(client.post(TEXT, json={"prompt": "word " * 40}), 400, "context_length_exceeded", "prompt", "64 tokens")
    for field in ("max_tokens", "max_completion_tokens"):
        fields = {"messages": USER, field: 10_000_000}
        expect(client.post(CHAT, json=fields), 400, "context_length_exceeded", field, "10000000")
    assert client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).status_code == 200


def test_more_choices_than_the_server_holds_are_not_worth_a_retry(client: FlaskClient, service: Service) -> None:
    capacity = service.max_num_seqs + service.max_queue
    expect(client.post(CHAT, json={"messages": USER, "n": capacity + 1}), 400, "invalid_request", "n", str(capacity))
    assert len(client.post(TEXT, json={"prompt": ["\n"] * capacity}).json["choices"]) == capacity


def test_one_bad_prompt_of_several_starts_none(client: FlaskClient, service: Service) -> None:
    expect(
        client.post(TEXT, json={"prompt": [[1, 2], [10**9]], "adapter": "forever"}), 400, "invalid_request", "prompt"
    )
    assert service.stats()["requests_waiting"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/nowhere", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/web/../app.py", 404, "not_found"),
        ("GET", "/web/%2e%2e/app.py", 404, "not_found"),
    ],
)
def test_unknown_routes_and_methods_have_the_same_shape(
    client: FlaskClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.open(path, method=method)
    expect(response, status, code, None)
    assert status != 405 or "Allow" in response.headers


def test_a_failure_inside_is_a_500_that_tells_no_secrets(
    service: Service, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: Any) -> None:
        raise RuntimeError("secret path /root")

    monkeypatch.setattr(service, "generate", explode)
    error = expect(client.post(CHAT, json={"messages": USER}), 500, "internal_error", None)
    assert "secret" not in error["message"] and error["type"] == "server_error"
    assert "secret path /root" in caplog.text, "the log has what the client is not told"
    monkeypatch.undo()


def test_a_stopped_engine_is_not_ready(make_service: Callable[..., Service]) -> None:
    service = make_service()
    client = create_app(service).test_client()
    assert client.get("/ready").json == {"status": "ready"}
    service.stop()
    assert client.get("/health").status_code == 200
    for response in (client.get("/ready"), client.post(CHAT, json={"messages": USER})):
        expect(response, 503, "not_ready", None)
        assert response.headers["Retry-After"]
