import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.errors import DataError
from loraserve.train.dialogue import Dialogue, read_dialogue
from loraserve.train.rows import BadRow, DataFile, Rejections

ANSWERED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "data.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def dialogues_of(path: Path) -> list[Dialogue]:
    return [read_dialogue(row) for row in DataFile(path).rows()]


def rejections_of(path: Path) -> Rejections:
    rejections = Rejections()
    for row in DataFile(path).rows():
        try:
            read_dialogue(row)
        except BadRow as error:
            rejections.add(row.line, str(error))
    return rejections


def test_all_four_formats_give_the_same_messages(tmp_path):
    dialogues = dialogues_of(
        written(
            tmp_path,
            {"conversations": ANSWERED},
            {"messages": ANSWERED},
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]},
            {"instruction": "2+2?", "input": "", "output": "four"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWERED[1]]},
        )
    )
    assert [dialogue.messages for dialogue in dialogues] == [ANSWERED] * 5
    assert [dialogue.format for dialogue in dialogues] == ["MiniMind", "OpenAI", "ShareGPT", "Alpaca", "OpenAI"]


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history(tmp_path):
    row = {"instruction": "Translate", "input": "cat", "output": "猫", "system": "Be brief", "history": [["hi", "yo"]]}
    [dialogue] = dialogues_of(written(tmp_path, row))
    assert [(m["role"], m["content"]) for m in dialogue.messages] == [
        ("system", "Be brief"),
        ("user", "hi"),
        ("assistant", "yo"),
        ("user", "Translate\ncat"),
        ("assistant", "猫"),
    ]


def test_one_json_array_reads_like_lines(tmp_path):
    path = tmp_path / "data.json"
    odd = {"messages": [{"role": "user", "content": 'a, [b] {"c\\'}, ANSWERED[1]]}
    for indent in (None, 2):
        path.write_text(json.dumps([{"messages": ANSWERED}, odd], indent=indent))
        file = DataFile(path)
        rows = list(file.rows())
        assert [row.line for row in rows] == [1, 2]
        assert [json.loads(row.raw) for row in rows] == [{"messages": ANSWERED}, odd]
        assert [file.row(row.line, row.offset, len(row.raw)) for row in rows] == rows


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("[{GOOD}, {GOOD}", "does not end: a quote or bracket is missing after item 1"),
        ("[{GOOD}, {GOOD},", "does not end: a quote or bracket is missing after item 2"),
        ('[{GOOD}, {"a": "]', "does not end: a quote or bracket is missing after item 1"),
        ("[", "does not end"),
        ("[{GOOD}] {GOOD}", "ends after item 1, and more follows it"),
    ],
)
def test_an_array_that_is_broken_as_a_whole_is_refused_and_says_where(tmp_path, broken, reason):
    path = tmp_path / "data.json"
    path.write_text(broken.replace("{GOOD}", json.dumps({"messages": ANSWERED})))
    with pytest.raises(DataError, match=reason):
        list(DataFile(path).rows())


def test_a_broken_item_of_an_array_is_a_bad_row_and_the_others_are_good(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{GOOD}, {"messages" 1}, {GOOD},]'.replace("{GOOD}", json.dumps({"messages": ANSWERED})))
    assert [reason.lines for reason in rejections_of(path).reasons.values()] == [[2], [4]]


def test_a_row_is_read_again_by_its_place_and_never_from_a_file_that_changed(tmp_path):
    path = written(tmp_path, {"messages": ANSWERED}, {"instruction": "你好", "output": "好"})
    file = DataFile(path)
    rows = list(file.rows())
    again = [file.row(row.line, row.offset, len(row.raw)) for row in rows]
    assert again == rows and json.loads(again[1].raw)["output"] == "好"
    with path.open("ab") as more:
        more.write(b"\n")
    with pytest.raises(DataError, match=r"data\.jsonl was changed while it was in use; start again"):
        file.row(1, 0, 5)


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
    [dialogue] = dialogues_of(written(tmp_path, row))
    assert dialogue.tools == tools
    assert dialogue.messages[2]["tool_calls"] == calls
    assert "reasoning_content" not in dialogue.messages[2] and dialogue.messages[4]["reasoning_content"] == "easy"
    assert dialogues_of(written(tmp_path, {"messages": ANSWERED, "tools": tools}))[0].tools == tools
    empty = {"conversations": [ANSWERED[0], ANSWERED[1] | {"tool_calls": "", "tools": ""}]}
    assert dialogues_of(written(tmp_path, empty))[0].messages == ANSWERED


def test_sharegpt_rows_have_their_own_system_prompt_and_function_calls(tmp_path):
    call = {"name": "add", "arguments": {"a": 2}}
    row = {
        "system": "Be brief",
        "tools": json.dumps([{"name": "add"}]),
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four"},
        ],
    }
    [dialogue] = dialogues_of(written(tmp_path, row))
    assert dialogue.messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    assert dialogue.tools == [{"name": "add"}]


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_harmless(tmp_path):
    line = json.dumps({"messages": ANSWERED}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    file = DataFile(path)
    assert [row.line for row in file.rows()] == [1, 3]
    assert [read_dialogue(row).messages for row in file.rows()] == [ANSWERED] * 2


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
    rejections = rejections_of(path)
    assert rejections.rows == 13
    message = str(rejections)
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


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (ANSWERED[::-1], "roles out of order: assistant follows nothing, not user or tool"),
        ([*ANSWERED, ANSWERED[1]], "roles out of order: assistant follows assistant, not user or tool"),
        ([*ANSWERED, {"role": "system", "content": "x"}], "roles out of order: a system message is not the first"),
        ([ANSWERED[0], {"role": "tool", "content": "x"}, ANSWERED[1]], "tool follows user, not assistant or tool"),
        ([ANSWERED[0], ANSWERED[1] | {"tool_calls": ["add"]}], "'tool_calls' is not a list of JSON objects"),
        ([ANSWERED[0], ANSWERED[1] | {"tool_calls": [{"arguments": {}}]}], "a tool call has no 'name'"),
        ([ANSWERED[0], ANSWERED[1] | {"reasoning_content": 3}], "'reasoning_content' of a message is not text"),
    ],
)
def test_a_row_that_would_teach_something_else_than_it_says_is_refused(tmp_path, messages, reason):
    assert reason in str(rejections_of(written(tmp_path, {"messages": messages})))


def test_a_user_may_speak_twice_and_last_and_a_tool_several_times(tmp_path):
    tool = {"role": "tool", "content": "4"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    rows = [
        {"messages": [ANSWERED[0], *ANSWERED, ANSWERED[0]]},
        {"messages": [ANSWERED[0], call, tool, tool, ANSWERED[1]]},
    ]
    assert not rejections_of(written(tmp_path, *rows)).rows


def test_an_alpaca_row_that_asks_nothing_is_refused(tmp_path):
    row = {"instruction": " ", "input": "", "output": "four"}
    assert "'instruction' and 'input' are empty" in str(rejections_of(written(tmp_path, row)))


def test_hostile_json_is_a_bad_row_like_any_other(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": "[" * 200_000}
    path = written(
        tmp_path,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 200_000,
        {"messages": [ANSWERED[0], calls]},
    )
    rejections = str(rejections_of(path))
    for expected in ("line 1: a number", "line 2: JSON nested too deeply", "line 3: 'tool_calls' is not JSON"):
        assert expected in rejections


def test_a_thousand_bad_rows_make_one_readable_line(tmp_path):
    rows = [{"text": "x"}] * 500 + [{"messages": [{"role": f"role{i}", "content": "hi"}]} for i in range(500)]
    rejections = rejections_of(written(tmp_path, *rows))
    assert rejections.rows == 1000
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8 and 492 more: has neither" in str(rejections)
    assert len(str(rejections)) < 1500 and str(rejections).endswith("and 489 more with other problems")


def test_a_missing_file_and_one_that_cannot_be_read_twice_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        DataFile(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a file; rows are read more than once, so save them to one"):
        DataFile(tmp_path)


def test_the_check_of_rows_loads_no_model_library():
    """Its process is to be small: it may stand beside a server."""
    code = "import loraserve.train.check, sys; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
