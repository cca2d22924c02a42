import json
from pathlib import Path

import pytest

from loraserve.errors import DataError
from loraserve.train.rows import read_file

ANSWERED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "data.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def test_all_four_formats_give_the_same_messages(tmp_path):
    file = read_file(
        written(
            tmp_path,
            {"conversations": ANSWERED},
            {"messages": ANSWERED},
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]},
            {"instruction": "2+2?", "input": "", "output": "four"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWERED[1]]},
        )
    )
    assert [dialogue.messages for dialogue in file.dialogues] == [ANSWERED] * 5
    assert [dialogue.line for dialogue in file.dialogues] == [1, 2, 3, 4, 5]


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history(tmp_path):
    row = {"instruction": "Translate", "input": "cat", "output": "猫", "system": "Be brief", "history": [["hi", "yo"]]}
    [dialogue] = read_file(written(tmp_path, row)).dialogues
    assert [(m["role"], m["content"]) for m in dialogue.messages] == [
        ("system", "Be brief"),
        ("user", "hi"),
        ("assistant", "yo"),
        ("user", "Translate\ncat"),
        ("assistant", "猫"),
    ]


def test_one_json_array_reads_like_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": ANSWERED}, {"messages": ANSWERED[::-1]}], indent=2))
    assert [dialogue.line for dialogue in read_file(path).dialogues] == [1, 2]


def test_tools_and_tool_calls_are_read_from_json_text_as_minimind_writes_them(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    calls = [{"name": "add", "arguments": {"a": 2}}]
    row = {
        "conversations": [
            {"role": "system", "content": "", "tools": json.dumps(tools), "tool_calls": None},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "", "tool_calls": json.dumps(calls), "reasoning_content": None},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four", "reasoning_content": "easy"},
        ]
    }
    [dialogue] = read_file(written(tmp_path, row)).dialogues
    assert dialogue.tools == tools
    assert dialogue.messages[2]["tool_calls"] == calls
    assert "reasoning_content" not in dialogue.messages[2] and dialogue.messages[4]["reasoning_content"] == "easy"
    assert read_file(written(tmp_path, {"messages": ANSWERED, "tools": tools})).dialogues[0].tools == tools


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_harmless(tmp_path):
    line = json.dumps({"messages": ANSWERED}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert [dialogue.line for dialogue in read_file(path).dialogues] == [1, 3]


def test_every_unusable_row_is_named_at_once_with_line_and_reason(tmp_path):
    path = written(
        tmp_path,
        {"messages": ANSWERED},
        b'{"messages": [',
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "asistant", "content": "hi"}]},
        b"\xff\xfe",
        {"text": "a pretraining row"},
        {"messages": []},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [ANSWERED[0], {"role": "assistant", "content": "  "}]},
        {"messages": [{"role": "user", "content": "again"}]},
        b"null",
        b"[1]",
        {"conversations": [{"from": "narrator", "value": "hi"}]},
        {"messages": [ANSWERED[0], {"role": "assistant", "content": None, "tool_calls": "{broken"}]},
    )
    with pytest.raises(DataError) as caught:
        read_file(path)
    message = str(caught.value)
    assert message.startswith("data.jsonl: 13 rows cannot be used: ")
    for expected in (
        "line 2: broken JSON",
        "lines 3, 10: nothing to supervise: it has no assistant message",
        "line 4: unknown role 'asistant'; did you mean 'assistant'?",
        "line 5: not UTF-8",
        "line 6: has neither 'conversations' nor 'messages' nor 'instruction' and 'output'",
        "line 7: 'messages' is not a list of messages, or an empty one",
        "line 8: the content of a message is not text",
        "line 9: an assistant message is empty",
        "lines 11, 12: not a JSON object",
        "line 13: unknown role 'narrator'; use human, gpt",
        "line 14: 'tool_calls' is not JSON",
    ):
        assert expected in message
    assert "\n" not in message


def test_hostile_json_is_a_bad_row_like_any_other(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": "[" * 200_000}
    path = written(
        tmp_path,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 200_000,
        {"messages": [ANSWERED[0], calls]},
    )
    with pytest.raises(DataError) as caught:
        read_file(path)
    for expected in ("line 1: a number", "line 2: JSON nested too deeply", "line 3: 'tool_calls' is not JSON"):
        assert expected in str(caught.value)


def test_a_thousand_bad_rows_make_one_readable_line(tmp_path):
    rows = [{"messages": [{"role": f"role{i}", "content": "hi"}]} for i in range(500)] + [{"text": "x"}] * 500
    with pytest.raises(DataError, match="1000 rows cannot be used") as caught:
        read_file(written(tmp_path, *rows))
    assert len(str(caught.value)) < 1500 and "and 489 more kinds of problem" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_an_empty_file_is_refused_with_an_example(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'is empty; write one dialogue per line, like \{"conversations"'):
        read_file(path)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_file(tmp_path / "none.jsonl")
