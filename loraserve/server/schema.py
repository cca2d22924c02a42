"""The request bodies: which fields there are and of which type.

Known fields are strict (no "1" for 1, no 1 for true, no NaN); unknown ones are accepted and ignored, as OpenAI's
clients send ever new ones. A known field whose meaning cannot be honoured is refused by name. Ranges are
`SamplingParams`' business, so that they are the same offline.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from flask import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from werkzeug.exceptions import UnsupportedMediaType

from loraserve.engine.params import SamplingParams
from loraserve.errors import InvalidRequest
from loraserve.lora.spec import Spec, Term, make_spec, parse_spec

MAX_CHOICES = 128
RESERVED_TEMPLATE_KWARGS = frozenset({"messages", "tools", "add_generation_prompt"})
PLAIN_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "seed", "ignore_eos",
)  # fmt: skip


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


AnyBody = TypeVar("AnyBody", bound=Body)


def _fail(message: str, at: str = "") -> PydanticCustomError:
    """An error of the field being validated, or of `at` (such as '[2].scale') within it."""
    return PydanticCustomError("value", "{message}", {"message": message, "at": at})


class StreamOptions(Body):
    include_usage: bool = False


class Generate(Body):
    """What both completion routes share."""

    model: str | None = None
    adapter: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    logit_bias: Any = None

    @field_validator("adapter")
    @classmethod
    def _adapter(cls, value: Any) -> Spec | None:
        if value is None:
            return None
        try:
            return parse_spec(value) if isinstance(value, str) else make_spec(list(_terms(value)))
        except InvalidRequest as error:
            raise _fail(str(error)) from None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> tuple[str, ...]:
        stops = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise _fail("must be a string or a list of strings, none of them empty")
        return tuple(stops)

    @field_validator("logit_bias")
    @classmethod
    def _logit_bias(cls, value: Any) -> None:
        if value:
            raise _fail("is not supported: leave it out")

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Build the sampling parameters; a field that is absent or null has SamplingParams' default."""
        given = {name: value for name in PLAIN_FIELDS if (value := getattr(self, name)) is not None}
        stop_ids = tuple(self.stop_token_ids or ())
        stop = self.stop or ()
        return SamplingParams(max_tokens=max_tokens, stop=stop, stop_token_ids=stop_ids, logprobs=logprobs, **given)


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _content(cls, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise _fail("must be a string, or a list of parts {'type': 'text', 'text': ...}")
        for i, part in enumerate(value):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _fail("only parts {'type': 'text', 'text': ...} are understood", f"[{i}]")
        return "\n".join(part["text"] for part in value)


class ChatCompletion(Generate):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: Any = None
    open_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("messages")
    @classmethod
    def _messages(cls, value: list[Message]) -> list[Message]:
        for i, message in enumerate(value):
            if message.content is None and not (message.role == "assistant" and message.tool_calls):
                raise _fail("a message needs text as its content", f"[{i}].content")
        return value

    @field_validator("tools")
    @classmethod
    def _tools(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for i, tool in enumerate(value or []):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, Mapping):
                raise _fail("a tool is {'type': 'function', 'function': {'name': ...}}", f"[{i}]")
            if not isinstance(function.get("name"), str):
                raise _fail("must be a string", f"[{i}].function.name")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _tool_choice(cls, value: Any) -> Any:
        if value not in (None, "auto", "none"):
            raise _fail("must be 'auto' or 'none': a call cannot be forced")
        return value

    @field_validator("response_format")
    @classmethod
    def _response_format(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, Mapping) or value.get("type") != "text"):
            raise _fail("only {'type': 'text'} is supported: the answer's form cannot be forced")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if reserved := RESERVED_TEMPLATE_KWARGS & set(value or ()):
            raise _fail(f"{', '.join(sorted(reserved))} cannot be set here")
        return value


class Completion(Generate):
    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: Any) -> list[str | list[int]]:
        """One prompt or several; each a string or token ids."""
        if isinstance(value, str) or _is_ids(value):
            return [value]
        if isinstance(value, list) and value and all(isinstance(item, str) or _is_ids(item) for item in value):
            return value
        raise _fail("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")

    @field_validator("echo", "suffix", "best_of")
    @classmethod
    def _unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        if value and (info.field_name, value) != ("best_of", 1):
            raise _fail("is not supported: leave it out")
        return value


class LoadAdapter(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class PatchAdapter(Body):
    pinned: bool


class UnloadAdapter(Body):
    lora_name: str


def parse(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Read the JSON body of `request`.

    Raises UnsupportedMediaType, and InvalidRequest that names the field and lists everything that is wrong.
    """
    if not request.is_json:
        raise UnsupportedMediaType(
            f"the body must be JSON with Content-Type: application/json, not {request.mimetype or 'nothing'}"
        )
    try:
        return kind.model_validate_json(request.get_data(cache=False))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    raise InvalidRequest("; ".join(map(_describe, problems[:5])), param=_path(problems[0]) or None)


def _describe(problem: ErrorDetails) -> str:
    path = _path(problem)
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}"
    if problem["type"] == "missing":
        return f"{path}: this field is required"
    if not path:
        return "the body must be a JSON object"
    message = problem["msg"].removeprefix("Input ")
    given = "" if problem["type"] == "value" else f", got {_shorten(problem['input'])}"
    return f"{path}: {message}{given}"


def _path(problem: ErrorDetails) -> str:
    """messages[0].role"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
    return ("".join(steps) + str(problem.get("ctx", {}).get("at", ""))).lstrip(".")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _terms(value: Any) -> Sequence[Term]:
    if not isinstance(value, list):
        raise _fail("must be a SPEC such as 'a:0.7+b:0.3', or a list of {'name', 'scale'}")
    terms = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise _fail("must be {'name': string, 'scale': number}", f"[{i}]")
        scale = item.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or abs(scale) > 1e30:
            raise _fail("must be a number", f"[{i}].scale")
        terms.append(Term(item["name"], float(scale)))
    return terms


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
