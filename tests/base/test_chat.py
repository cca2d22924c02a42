"""Chat templates: rendered as transformers renders them, in a sandbox that foreign code does not leave."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from loraserve.base.chat import ChatTemplate
from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import CheckpointError, InvalidRequest

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hi!", "reasoning_content": "greet back"},
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant", "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}],
    },
    {"role": "tool", "content": '{"temperature": 3}'},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "it's <cold>", "parameters": {"a": None}}}]


@pytest.fixture
def render(tiny_base_dir: Path, tmp_path: Path) -> Any:
    """Renders a template's source with the tiny base's special tokens."""

    def render(source: str, messages: Any = MESSAGES, **options: Any) -> str:
        return template(source).render(messages, **options)

    def template(source: str) -> ChatTemplate:
        (tmp_path / "tokenizer.model").write_bytes((tiny_base_dir / "tokenizer.model").read_bytes())
        config = {"chat_template": source, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTemplate(Tokenizer(tmp_path))

    return render


@pytest.mark.parametrize("generation", ["minimind-3-tokenizer", "minimind2-tokenizer"])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_miniminds_templates_render_as_in_transformers(
    generation: str, thinking: bool, tools: Any, count: int, conformance: Path
) -> None:
    tokenizer = Tokenizer(conformance / generation)
    kwargs = {"open_thinking": thinking, **tokenizer.special_tokens}
    [wanted], _ = render_jinja_template(
        [MESSAGES[:count]],
        tools=tools,
        chat_template=tokenizer.config["chat_template"],
        add_generation_prompt=True,
        **kwargs,
    )
    assert ChatTemplate(tokenizer).render(MESSAGES[:count], tools=tools, open_thinking=thinking) == wanted
    assert "你好" in wanted and (tools is None or "it's <cold>" in wanted)


def test_open_thinking_ends_the_prompt_inside_the_reasoning(conformance: Path) -> None:
    template = ChatTemplate(Tokenizer(conformance / "minimind-3-tokenizer"))
    assert template.render(MESSAGES[:2], open_thinking=True).endswith("<|im_start|>assistant\n<think>\n")
    assert template.render(MESSAGES[:2]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_without_generation_prompt_the_text_ends_with_the_last_message(tiny_base_dir: Path) -> None:
    template = ChatTemplate(Tokenizer(tiny_base_dir))
    assert template.render(MESSAGES[1:2], add_generation_prompt=False) == "<|im_start|>user\n你好<|im_end|>\n"
    assert template.render(MESSAGES[1:2]) == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


def test_json_keeps_html_and_chinese_as_they_are(render: Any) -> None:
    value = {"role": "user", "content": "<b>&'\" 你好"}
    assert render("{{ messages[0] | tojson }}", [value]) == json.dumps(value, ensure_ascii=False)
    assert render("{{ messages[0].content | tojson(ensure_ascii=true) }}", [value]) == json.dumps(value["content"])
    assert render("{{ messages[0] | tojson(indent=2) }}", [value]) == json.dumps(value, ensure_ascii=False, indent=2)


def test_blocks_leave_no_lines_of_their_own(render: Any) -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source, MESSAGES[:2]) == "system\nuser\n"


def test_loop_controls(render: Any) -> None:
    source = "{% for m in messages %}{% if loop.index == 1 %}{% continue %}{% endif %}{{ m.role }},{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}"
    assert render(source) == "user,assistant,"


def test_marks_around_the_assistants_text_do_not_show(render: Any) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    assert render(source, MESSAGES[1:3]) == "你好|Hi!|"


def test_special_tokens_date_and_arguments_are_at_hand(render: Any) -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ flag }}{{ nothing }}", flag=3) == "<|im_start|><|im_end|>3"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_arguments_do_not_replace_the_conversation(render: Any) -> None:
    assert render("{{ messages[0].content }}{{ tools }}", [{"content": "hi"}], bos_token="other") == "hiNone"


def test_exception_of_the_template_is_a_bad_request_with_its_text(render: Any) -> None:
    with pytest.raises(InvalidRequest, match="system message must come first") as caught:
        render("{{ raise_exception('the system message must come first') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'].missing.deeper }}",
        "{{ messages[99].content.strip() }}",
        "{{ messages[0].content + 3 }}",
        "{{ 1 // 0 }}",
        "{{ messages | dictsort }}",
        "{{ messages[0] | no_such_filter_exists_at_render if false }}{{ none.x.y }}",
        "{{ nothing | tojson }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'other' %}",
    ],
)
def test_template_that_fails_on_these_messages_is_a_bad_request(render: Any, source: str) -> None:
    with pytest.raises((InvalidRequest, CheckpointError)):
        render(source)
    assert render("{{ messages[0].role }}") == "system"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ ''['__class__'] }}",
    "{{ ('' | attr('__class__')) }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ self.__init__.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_hands_out_no_internals(render: Any, source: str) -> None:
    try:
        text = render(source)
    except InvalidRequest as error:
        assert isinstance(error.__context__, SecurityError) or "undefined" in str(error)
    else:
        assert "class" not in text and "module" not in text, text


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ messages.clear() }}"]
)
def test_template_cannot_change_the_conversation(render: Any, source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match=r"unsafe|not safely callable"):
        render(source, messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_template_that_does_not_compile_is_named_when_loading(render: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} does not compile"):
        render("{% for m in messages %}")


def test_template_file_comes_before_the_configuration(render: Any, tmp_path: Path) -> None:
    assert render("from the configuration") == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from the file 你好", "utf-8")
    assert render("from the configuration") == "from the file 你好"


def test_of_several_named_templates_the_default_is_taken(render: Any) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert render(named) == "plain"
    assert render(named[:1]) == "tools"


def test_base_without_a_template_loads_and_says_so_when_asked_to_chat(render: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"no chat template.*tokenizer_config\.json"):
        render(None)
