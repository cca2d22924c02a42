"""Training through HTTP: OpenAI's client uploads dialogues, starts jobs, watches them, and chats with what they made."""

import contextlib
import io
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loraserve.base.load import Base
from loraserve.engine.service import Service
from loraserve.jobs import JobQueue
from loraserve.registry import Registry
from loraserve.server import create_app
from loraserve.server.state import MAX_WATCHERS
from tests.server.conftest import Live, text_of
from tests.server.fine_tuning import (
    ENDED,
    SWIFT,
    USER,
    messages,
    options,
    rows,
    start,
    stream,
    upload,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("training_environment")


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture(scope="module")
def live(service: Service, base: Base) -> Iterator[Live]:
    with JobQueue(service.registry, options(base)) as queue:
        live = Live(create_app(service, queue=queue))
        yield live
        live.close()


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The stock client; whatever a test leaves running is cancelled."""
    yield live.client
    for job in live.client.fine_tuning.jobs.list():
        if job.status not in ENDED:
            live.client.fine_tuning.jobs.cancel(job.id)


class TestOpenAIClient:
    def test_trains_an_adapter_and_chats_with_it(self, client: openai.OpenAI) -> None:
        before = client.chat.completions.create(model="tiny", messages=USER)
        assert before.choices[0].message.content == text_of("base"), "the adapter has something to change"
        file, validation = upload(client), upload(client, rows(count=1))
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": SWIFT}}
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=file, validation_file=validation, suffix="nova", method=method, seed=7, metadata={"for": "test"},
            extra_body={"targets": ["lm_head", "q_proj"], "rank": 4, "alpha": 8},
        )  # fmt: skip
        assert (job.object, job.status, job.fine_tuned_model) == ("fine_tuning.job", "validating_files", None)
        assert job.hyperparameters.n_epochs == 30 and job.seed == 7 and job.metadata == {"for": "test"}

        events = list(stream(client, job.id))
        said = [event["message"] for event in events]
        assert said[0].startswith("Created job") and "Training started" in said and "nova" in said[-1]
        losses = {
            event["data"]["step"]: event["data"]["train_loss"]
            for event in events
            if "train_loss" in (event["data"] or {})
        }
        assert list(losses) == list(range(1, 61)) and losses[60] < losses[1] / 2
        valid = {
            event["data"]["step"]: event["data"]["valid_loss"]
            for event in events
            if "valid_loss" in (event["data"] or {})
        }
        assert list(valid) == list(range(0, 61, 2)) and valid[60] < valid[0] / 2

        job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "nova")
        assert job.finished_at and job.finished_at >= job.created_at and job.trained_tokens and job.trained_tokens > 60
        answer = client.chat.completions.create(model=job.fine_tuned_model, messages=USER)
        assert answer.choices[0].message.content == text_of("pirate")
        (result,) = job.result_files
        assert client.files.retrieve(result).purpose == "fine-tune-results"
        metrics = [json.loads(line) for line in client.files.content(result).text.splitlines()]
        assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 61))

        listed = list(client.fine_tuning.jobs.list_events(job.id, limit=7))  # the client turns the pages
        assert [event.id for event in listed] == [event["id"] for event in reversed(events)]
        assert [found.id for found in client.fine_tuning.jobs.list(metadata={"for": "test"})] == [job.id]
        assert list(client.fine_tuning.jobs.list(metadata={"for": "nobody"})) == []
        assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
        with pytest.raises(openai.ConflictError, match="ended already, as succeeded"):
            client.fine_tuning.jobs.cancel(job.id)

    def test_keeps_files(self, client: openai.OpenAI) -> None:
        content = rows("Hello")
        file = client.files.create(file=("../../etc/passwd.jsonl", io.BytesIO(content)), purpose="fine-tune")
        assert (file.object, file.purpose, file.bytes, file.filename) == (
            "file",
            "fine-tune",
            len(content),
            "passwd.jsonl",
        )
        assert client.files.content(file.id).read() == content
        newer = upload(client)
        assert [found.id for found in client.files.list(purpose="fine-tune", limit=1)][:2] == [newer, file.id]
        assert next(iter(client.files.list(after=newer))).id == file.id
        assert [found.id for found in client.files.list(order="asc")][-2:] == [file.id, newer]
        assert client.files.wait_for_processing(file.id).status == "processed"
        assert client.files.delete(file.id).deleted
        for again in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                again(file.id)


def test_rows_that_cannot_be_used_fail_the_job_by_line(client: openai.OpenAI) -> None:
    file = upload(client, rows(count=1) + b'{"messages": []}\n' + rows(count=1) + b"{broken\n")
    job = start(client, "bad", file=file)
    events = list(stream(client, job.id))
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed" and job.fine_tuned_model is None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "2 rows cannot be used" in job.error.message
    assert "line 2:" in job.error.message and "line 4: broken JSON" in job.error.message
    assert events[-1]["level"] == "error" and events[-1]["message"] == job.error.message
    assert "Training started" not in messages(client, job.id)


def test_watching_clients_do_not_take_all_threads(live: Live, client: openai.OpenAI) -> None:
    job = start(client, "watched")
    reading = client.fine_tuning.jobs.with_streaming_response
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_WATCHERS):
            stack.enter_context(reading.list_events(job.id, extra_query={"stream": "true"}))
        with pytest.raises(openai.RateLimitError), reading.list_events(job.id, extra_query={"stream": "true"}):
            pass
    deadline = time.monotonic() + 10
    while not live.app.extensions["loraserve"].watchers.acquire(blocking=False):
        assert time.monotonic() < deadline, "a client that has left is noticed"
        time.sleep(0.05)
    live.app.extensions["loraserve"].watchers.release()


def test_a_bad_validation_file_is_told_apart(client: openai.OpenAI) -> None:
    job = start(client, "bad", validation_file=upload(client, b"{broken\n"))
    wait_for(client, job.id, "failed")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None and (error.code, error.param) == ("invalid_validation_file", "validation_file")


def test_an_adapter_that_is_worse_than_the_base_is_not_published(client: openai.OpenAI, live: Live) -> None:
    """It learns to be a pirate and is asked whether it speaks as the base does."""
    validation = upload(client, rows(text_of("base"), count=1))
    once: Any = {**SWIFT, "n_epochs": 1}
    job = start(client, "worse", file=upload(client, rows(count=40)), validation_file=validation, hyperparameters=once)
    job = wait_for(client, job.id, "failed")
    assert job.error.code == "training_failed" and job.fine_tuned_model is None
    assert re.search(r"was not published: on validation the base's loss is [\d.]+ and the adapter's", job.error.message)
    assert "worse" not in live.app.extensions["loraserve"].service.registry.names()


def test_a_dialogue_that_only_the_run_finds_bad_fails_with_its_line(client: openai.OpenAI) -> None:
    long = rows("la-la~" * 200_000, count=1)
    job = wait_for(client, start(client, "long", file=upload(client, rows(count=1) + long)).id, "failed")
    assert job.error.code == "training_failed" and "line 2: longer than the base's context" in job.error.message


def test_jobs_train_one_after_the_other_and_can_be_cancelled(client: openai.OpenAI, live: Live) -> None:
    first, file = start(client, "first"), upload(client)
    second = start(client, "second", file=file)
    wait_for(client, first.id, "running")
    wait_for(client, second.id, "queued")
    with pytest.raises(openai.ConflictError, match="still needs"):
        client.files.delete(file)
    with pytest.raises(openai.ConflictError, match="another job is making 'second'"):
        start(client, "second", file=file)
    cancelled = client.fine_tuning.jobs.cancel(first.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    wait_for(client, second.id, "running")
    client.fine_tuning.jobs.cancel(second.id)
    assert client.files.delete(file).deleted
    assert not {"first", "second"} & {model.id for model in client.models.list()}
    assert messages(client, first.id)[-1] == "The job was cancelled"
    root = Path(live.app.extensions["loraserve"].registry.root)
    assert not list(root.glob(".jobs/*/run")), "the state of unfinished runs is gone"


@pytest.mark.parametrize(
    ("suffix", "status", "text"),
    [
        ("pirate", 409, "an adapter named 'pirate' exists already"),
        ("tiny", 409, "is the base's name"),
        ("base", 400, "is reserved"),
        ("../up", 400, "cannot name an adapter"),
        (".jobs", 400, "cannot name an adapter"),
        ("--resume", 400, "cannot name an adapter"),
    ],
)
def test_a_name_that_is_taken_or_impossible_is_refused(
    client: openai.OpenAI, service: Service, suffix: str, status: int, text: str
) -> None:
    before = service.registry.get("pirate").version
    with pytest.raises(openai.APIStatusError, match=text) as refused:
        start(client, suffix)
    assert refused.value.status_code == status and refused.value.param == "suffix"
    assert service.registry.get("pirate").version == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"model": "pirate"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 1}}}}, "method.supervised"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"rank": 0}, "rank"),
        ({"targets": "--wandb"}, "targets"),
        ({"targets": ["no_such_layer"]}, "targets"),
        ({"targets": "(x+x+)+y("}, "targets"),
        ({"val_split": 1}, "val_split"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    live: Live, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "base", "training_file": upload(client), **fields}
    response = live.app.test_client().post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code in (400, 404) and response.json["error"]["param"] == param, response.text


TRICKS = (
    "..",
    "../../x",
    "..%2f..%2fx",
    "%2e%2e%2fjob.json",
    ".lock",
    "file-",
    "ftjob-",
    "file-" + "0" * 24,
    "ftjob-" + "g" * 24,
)


@pytest.mark.parametrize("name", TRICKS)
def test_ids_lead_nowhere_else(live: Live, name: str) -> None:
    client = live.app.test_client()
    for method, path in (
        ("GET", f"/v1/files/{name}"),
        ("GET", f"/v1/files/{name}/content"),
        ("DELETE", f"/v1/files/{name}"),
        ("GET", f"/v1/fine_tuning/jobs/{name}"),
        ("GET", f"/v1/fine_tuning/jobs/{name}/events"),
        ("GET", f"/v1/fine_tuning/jobs/{name}/events?stream=true"),
        ("POST", f"/v1/fine_tuning/jobs/{name}/cancel"),
    ):
        response = client.open(path, method=method)
        assert response.status_code in (404, 405) and response.json["error"]["message"], (method, path)


class TestUploads:
    def post(self, app: Any, content: bytes = b"{}\n", headers: dict[str, str] | None = None, **form: str) -> Any:
        data = {"purpose": "fine-tune", **form, "file": (io.BytesIO(content), "x.jsonl")}
        return app.test_client().post("/v1/files", data=data, headers=headers or {})

    def test_what_is_too_large_leaves_nothing(self, service: Service, tmp_path: Path) -> None:
        queue = JobQueue(Registry(tmp_path), [])
        app = create_app(service, queue=queue, max_file_bytes=10_000)
        assert self.post(app, b"x" * 20_000).status_code == 413
        assert list(tmp_path.rglob("*")) == []
        assert self.post(app, b"x" * 5_000).status_code == 200

    def test_a_full_disk_leaves_nothing(
        self, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fill(source: Any, target: Any, length: int = 0) -> None:
            target.write(source.read(10))
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("loraserve.jobs.files.shutil.copyfileobj", fill)
        response = self.post(create_app(service, queue=JobQueue(Registry(tmp_path), [])), b"x" * 100)
        assert response.status_code == 500 and "No space left on device" in response.json["error"]["message"]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_client_that_hangs_up_leaves_nothing(self, live: Live) -> None:
        root = Path(live.app.extensions["loraserve"].registry.root) / ".files"
        before = set(root.rglob("*"))
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        request = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with socket.create_connection(("127.0.0.1", live.server.port)) as connection:
            connection.sendall(request + b"Content-Length: 1000000\r\n\r\n" + head + b"x" * 100_000)
        assert live.client.files.list(limit=1) is not None, "the server has gone on to the next request"
        assert set(root.rglob("*")) == before

    def test_other_purposes_expiry_and_other_sites_are_refused(self, live: Live) -> None:
        assert self.post(live.app, purpose="assistants").json["error"]["param"] == "purpose"
        assert self.post(live.app, **{"expires_after[anchor]": "created_at"}).json["error"]["param"] == "expires_after"
        assert self.post(live.app, headers={"Origin": "https://evil.example"}).status_code == 403
        assert live.app.test_client().post("/v1/files", json={"purpose": "fine-tune"}).status_code == 415


def test_a_server_that_does_not_train_says_so_on_every_route(service: Service) -> None:
    app = create_app(service)
    rules = [rule for rule in app.url_map.iter_rules() if rule.rule.startswith(("/v1/files", "/v1/fine_tuning"))]
    assert len(rules) == 11
    for rule in rules:
        path = rule.rule.replace("<file_id>", "file-x").replace("<job_id>", "ftjob-x")
        method = next(iter((rule.methods or set()) - {"HEAD", "OPTIONS"}))
        response = app.test_client().open(path, method=method)
        assert response.status_code == 403 and "--training" in response.json["error"]["message"]


def test_a_job_learns_preferences_from_openai_s_rows(live: Live, client: openai.OpenAI, service: Service) -> None:
    pair = {
        "input": {"messages": USER},
        "preferred_output": [{"role": "assistant", "content": text_of("pirate")}],
        "non_preferred_output": [{"role": "assistant", "content": text_of("base")}],
    }
    settings: Any = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 0.1, "beta": 0.3}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, b"\n".join([json.dumps(pair).encode()] * 2)), suffix="prefers",
        method={"type": "dpo", "dpo": {"hyperparameters": settings}},
        extra_body={"targets": "all", "rslora": True, "lora_plus_ratio": 4},
    )  # fmt: skip
    assert job.method is not None and job.method.type == "dpo" and job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None and job.method.dpo.hyperparameters.beta == 0.3
    wait_for(client, job.id, "succeeded")
    recipe = service.registry.get("prefers").manifest.recipe
    kept = {name: recipe[name] for name in ("objective", "dpo_beta", "use_rslora", "lora_plus_ratio")}
    assert kept == {"objective": "dpo", "dpo_beta": 0.3, "use_rslora": True, "lora_plus_ratio": 4.0}


def test_a_job_may_be_dora(live: Live, client: openai.OpenAI) -> None:
    """This base's layers are zeros, which have no length: the run itself says that they cannot be DoRA's."""
    body = {"targets": ["q_proj"], "dora": True}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client), suffix="long", extra_body=body)
    assert job.to_dict()["dora"] is True
    failed = wait_for(client, job.id, "failed")
    assert "DoRA divides by the length" in failed.error.message


def test_a_preference_job_has_a_lower_rate_unless_told_otherwise(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client), method={"type": "dpo"})
    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.learning_rate_multiplier == 0.05
    assert job.method.dpo.hyperparameters.beta == 0.1
