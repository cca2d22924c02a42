"""What tests of training through HTTP share: rows, and what OpenAI's client does with jobs."""

import json
import time
from collections.abc import Iterator
from typing import Any

import openai

from loraserve.base.load import Base
from tests.server.conftest import text_of

USER: Any = [{"role": "user", "content": "Who are you?"}]
ENDED = ("succeeded", "failed", "cancelled")
ENDLESS = {"n_epochs": 10_000}
SWIFT = {"n_epochs": 30, "batch_size": 2, "learning_rate_multiplier": 100}
"""Enough to turn the base's answer into the pirate's."""


def rows(answer: str = text_of("pirate"), count: int = 4) -> bytes:
    messages = [*USER, {"role": "assistant", "content": answer}]
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for _ in range(count))


def options(base: Base) -> list[str]:
    return [f"--base={base.path}", "--device=cpu", "--dtype=float32"]


def upload(client: openai.OpenAI, content: bytes | None = None) -> str:
    return client.files.create(file=("talk.jsonl", rows() if content is None else content), purpose="fine-tune").id


def start(client: openai.OpenAI, suffix: str | None = None, *, file: str | None = None, **fields: Any) -> Any:
    """Start a job; `targets` is `all`, for without `lm_head` there is nothing in this base to train."""
    own = {"targets": "all", **{key: fields.pop(key) for key in ("rank", "alpha", "val_split") if key in fields}}
    fields = {"model": "base", "hyperparameters": ENDLESS, **fields}
    training_file = file or upload(client)
    given = {} if suffix is None else {"suffix": suffix}
    return client.fine_tuning.jobs.create(training_file=training_file, extra_body=own, **given, **fields)


def wait_for(client: openai.OpenAI, job_id: str, *statuses: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline and job.status not in ENDED, (job, messages(client, job_id))
        time.sleep(0.05)
    return job


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def stream(client: openai.OpenAI, job_id: str) -> Iterator[dict[str, Any]]:
    """Read a job's events as they come; the last line is OpenAI's mark of the end."""
    reading = client.fine_tuning.jobs.with_streaming_response.list_events(job_id, extra_query={"stream": "true"})
    with reading as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    yield from map(json.loads, lines)
