"""The completion routes through Flask's test client: what they answer, whole and streamed."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient

from loraserve.engine.service import Service
from tests.server.conftest import CHAINS, END, FACES, REASONED, text_of

USER = [{"role": "user", "content": "Who are you?"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def chat(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert response.status_code == 200, response.text
    return response.json


def stream(client: FlaskClient, path: str, **fields: Any) -> list[Any]:
    response = client.post(path, json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_a_chat_answer_has_openais_form_and_names_the_adapter(client: FlaskClient) -> None:
    answer = chat(client, adapter="pirate")
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["adapter"] == "pirate" and answer["model"] == "tiny"
    message = {"role": "assistant", "content": text_of("pirate")}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    generated = len(CHAINS["pirate"])
    prompt = answer["usage"]["prompt_tokens"]
    usage = answer["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (generated, prompt + generated)


def test_usage_says_how_much_of_the_prompt_was_there_already(client: FlaskClient) -> None:
    turns = [{"role": "user", "content": "Tell me a long story about the sea and the moon."}]
    first = chat(client, messages=turns, adapter="poet")
    turns += [{"role": "assistant", "content": content(first)}, {"role": "user", "content": "Go on."}]
    second = chat(client, messages=turns, adapter="poet")["usage"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] - 1 <= cached < second["prompt_tokens"]
    other = chat(client, messages=turns, adapter="pirate")["usage"]["prompt_tokens_details"]
    assert other["cached_tokens"] < cached, "another adapter's values are not its own"


@pytest.mark.parametrize(
    ("fields", "adapter", "chain"),
    [
        ({}, "base", "base"),
        ({"model": "tiny"}, "base", "base"),
        ({"model": "pirate"}, "pirate", "pirate"),
        ({"model": "tiny:poet"}, "poet", "poet"),
        ({"model": "base:poet"}, "poet", "poet"),
        ({"model": "tiny", "adapter": "poet"}, "poet", "poet"),
        ({"model": "poet", "adapter": "poet"}, "poet", "poet"),
        ({"adapter": "base"}, "base", "base"),
        ({"adapter": "pirate:0.4"}, "pirate:0.4", "base"),
        ({"adapter": "pirate:0.7+poet:0.3"}, "pirate:0.7+poet:0.3", "pirate"),
        (
            {"adapter": [{"name": "pirate", "scale": 0.3}, {"name": "poet", "scale": 0.7}]},
            "pirate:0.3+poet:0.7",
            "poet",
        ),
    ],
)
def test_model_and_adapter_decide_who_answers(
    client: FlaskClient, fields: dict[str, Any], adapter: str, chain: str
) -> None:
    answer = chat(client, **fields)
    assert (answer["adapter"], content(answer)) == (adapter, text_of(chain))


def test_a_stream_is_the_whole_answer_in_parts(client: FlaskClient) -> None:
    chunks = stream(client, "/v1/chat/completions", messages=USER, adapter="poet")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text_of("poet")
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["adapter"] == "poet" and "usage" not in chunk for chunk in chunks)


def test_a_stream_ends_with_its_usage_if_asked(client: FlaskClient) -> None:
    fields = {"messages": USER, "adapter": "pirate"}
    whole = chat(client, **fields)["usage"]
    chunks = stream(client, "/v1/chat/completions", stream_options={"include_usage": True}, **fields)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {**whole, "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_n_choices_differ_by_seed_and_repeat_with_it(client: FlaskClient) -> None:
    fields = {"adapter": "dice", "n": 3, "seed": 7, "max_tokens": 12}
    first, again = chat(client, **fields), chat(client, **fields)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3, "three throws of six dice should differ"
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    alone = chat(client, adapter="dice", seed=8, max_tokens=12)
    assert content(alone) == texts[1]
    assert first["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert first["usage"]["completion_tokens"] == 36


def test_n_choices_stream_side_by_side(client: FlaskClient) -> None:
    fields = {"messages": USER, "adapter": "dice", "n": 2, "seed": 3, "max_tokens": 10}
    whole = chat(client, **fields)
    texts = ["", ""]
    for chunk in stream(client, "/v1/chat/completions", **fields):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_stop_strings_end_the_answer_and_are_not_in_it(client: FlaskClient) -> None:
    for stop in ("be", ["nowhere", "be"]):
        choice = chat(client, adapter="pirate", stop=stop)["choices"][0]
        assert choice["message"]["content"] == text_of("pirate").partition("be")[0]
        assert choice["finish_reason"] == "stop"


def test_max_tokens_ends_with_length(client: FlaskClient) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        choice = chat(client, adapter="pirate", **{field: 2})["choices"][0]
        assert choice["message"]["content"] == "Arrr matey" and choice["finish_reason"] == "length"


def test_chat_logprobs_are_openais(client: FlaskClient) -> None:
    fields = {"adapter": "dice", "max_tokens": 2, "seed": 1, "logprobs": True, "top_logprobs": 6}
    choice = chat(client, **fields)["choices"][0]
    roll, face = choice["logprobs"]["content"]
    assert roll["token"] == "roll:" and roll["logprob"] == pytest.approx(0.0, abs=1e-3)
    assert bytes(face["bytes"]).decode() == face["token"]
    assert {entry["token"] for entry in face["top_logprobs"]} == set(FACES)
    assert [entry["logprob"] for entry in face["top_logprobs"]] == pytest.approx([-1.7918] * 6, abs=1e-3)
    chunks = stream(client, "/v1/chat/completions", messages=USER, **fields)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in streamed if part for entry in part["content"]] == [roll, face]


def test_completion_logprobs_are_openais(client: FlaskClient) -> None:
    fields = {"prompt": "\n", "model": "dice", "max_tokens": 3, "seed": 1, "logprobs": 2}
    answer = client.post("/v1/completions", json=fields).json
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 5, 5 + len(logprobs["tokens"][1])]
    assert len(logprobs["token_logprobs"]) == 3 and len(logprobs["top_logprobs"][1]) == 2
    chunks = stream(client, "/v1/completions", **fields)
    offsets = [o for c in chunks if c["choices"][0]["logprobs"] for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == logprobs["text_offset"]


def test_completions_take_texts_and_token_ids(client: FlaskClient, service: Service) -> None:
    ids = service.base.tokenizer.encode("\n")
    expected = text_of("base")
    for prompt, count in (("\n", 1), (ids, 1), (["\n", "\n"], 2), ([ids, ids + ids], 2)):
        answer = client.post("/v1/completions", json={"prompt": prompt}).json
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == [expected] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    assert answer["usage"]["prompt_tokens"] == 3
    answer = client.post("/v1/completions", json={"prompt": ["\n", "\n"], "n": 2, "model": "pirate"}).json
    assert [choice["text"] for choice in answer["choices"]] == [text_of("pirate")] * 4
    assert answer["usage"]["prompt_tokens"] == 2


def test_a_completion_has_16_tokens_by_default(client: FlaskClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "\n", "adapter": "forever"}).json
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_tools_reach_the_prompt_and_calls_come_back_parsed(client: FlaskClient) -> None:
    without, with_tools = chat(client, adapter="caller"), chat(client, adapter="caller", tools=[WEATHER])
    assert "<tool_call>" in content(without), "without tools it is just text"
    assert with_tools["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    choice = with_tools["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    refused = chat(client, adapter="caller", tools=[WEATHER], tool_choice="none")
    assert content(refused) == content(without)


def test_a_streamed_tool_call_arrives_whole(client: FlaskClient) -> None:
    chunks = stream(client, "/v1/chat/completions", messages=USER, adapter="caller", tools=[WEATHER])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert not any(delta.get("content") for delta in deltas)
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert call["index"] == 0 and json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_results_and_calls_of_earlier_turns_are_accepted(client: FlaskClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert content(chat(client, messages=messages, tools=[WEATHER])) == text_of("base")


def test_reasoning_is_split_off(client: FlaskClient) -> None:
    message = chat(client, adapter="thinker")["choices"][0]["message"]
    assert message["reasoning_content"] == "hmm, let me see" and message["content"] == "Fine."
    deltas = [
        c["choices"][0]["delta"] for c in stream(client, "/v1/chat/completions", messages=USER, adapter="thinker")
    ]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hmm, let me see"
    assert "".join(d.get("content", "") for d in deltas) == "Fine."


@pytest.mark.parametrize("fields", [{"open_thinking": True}, {"chat_template_kwargs": {"open_thinking": True}}])
def test_open_thinking_reaches_the_template(client: FlaskClient, fields: dict[str, Any]) -> None:
    plain, thinking = chat(client), chat(client, **fields)
    assert content(plain) != content(thinking)
    assert thinking["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"], REASONED


def test_template_variables_may_have_any_name(client: FlaskClient) -> None:
    assert content(chat(client, chat_template_kwargs={"self": 1, "args": 2})) == content(chat(client))


def test_text_parts_and_developer_messages_are_understood(client: FlaskClient) -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    joined = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who\nare you?"}]
    usages = [chat(client, messages=m)["usage"] for m in (messages, joined)]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"]


def test_stop_token_ids_and_ignore_eos_are_vllms(client: FlaskClient, service: Service) -> None:
    stop = service.base.tokenizer.encode(CHAINS["pirate"][2])
    assert chat(client, adapter="pirate", stop_token_ids=stop)["usage"]["completion_tokens"] == 3
    answer = chat(client, adapter="pirate", ignore_eos=True, max_tokens=9)
    assert answer["usage"]["completion_tokens"] == 9 > CHAINS["pirate"].index(END) + 1


def test_unknown_fields_are_ignored_and_null_means_default(client: FlaskClient) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "max_tokens", "tools", "adapter", "model"))
    assert content(chat(client, store=True, metadata={"a": "b"}, user="me", **nulls)) == text_of("base")
