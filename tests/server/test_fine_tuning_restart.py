"""Training through HTTP across ends: of the run, of the server, of the machine; and the command that allows it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from click.testing import CliRunner
from flask import Flask

from loraserve.base.load import Base
from loraserve.cli.main import main
from loraserve.engine.service import Service
from loraserve.errors import Conflict, QueueFull
from loraserve.jobs import Job, JobQueue
from loraserve.jobs.ids import new_id
from loraserve.registry import Registry
from tests.server.fine_tuning import (
    messages,
    options,
    rows,
    start,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("training_environment")


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


def a_job(queue: JobQueue, name: str, base: Base, **fields: Any) -> Job:
    file = queue.files.add(io.BytesIO(rows()), "talk.jsonl", "fine-tune")
    job = Job(
        id=new_id("ftjob"), created_at=0, model="tiny", base_fingerprint=base.fingerprint, name=name, suffix=name,
        training_file=file.id, validation_file=None, n_epochs=200, batch_size=4, learning_rate_multiplier=1.0, seed=1,
        targets="all",
    )  # fmt: skip
    return replace(job, **fields)


def until(queue: JobQueue, job: Job, check: Callable[[Job], bool], seconds: float = 120) -> Job:
    deadline = time.monotonic() + seconds
    while not check(now := queue.jobs.get(job.id)):
        assert time.monotonic() < deadline, (now, queue.jobs.events(job.id))
        time.sleep(0.02)
    return now


def steps(queue: JobQueue, job: Job) -> list[int]:
    return [event["data"]["step"] for event in queue.jobs.events(job.id) if event["data"]]


class TestRestart:
    @pytest.fixture
    def registry(self, base: Base, tmp_path: Path) -> Registry:
        return Registry(tmp_path, base.shapes, base.fingerprint)

    def test_a_run_goes_on_and_what_waits_keeps_waiting(self, registry: Registry, base: Base) -> None:
        with JobQueue(registry, options(base)) as queue:
            first, second = a_job(queue, "one", base), a_job(queue, "two", base, n_epochs=1)
            queue.add(first)
            queue.add(second)
            until(queue, first, lambda _: len(steps(queue, first)) > 3)
        assert queue.jobs.get(first.id).status == "running" and registry.names() == []
        with JobQueue(registry, options(base)) as queue:
            assert {job.id for job in queue.jobs.iterate()} == {first.id, second.id}
            until(queue, first, lambda job: job.ended)
            until(queue, second, lambda job: job.ended)
        assert [queue.jobs.get(job.id).status for job in (first, second)] == ["succeeded"] * 2
        assert registry.names() == ["one", "two"]
        told = steps(queue, first)
        assert told == sorted(set(told)) and told[-1] == 200, "each step is told once"
        assert "resuming after step" in (queue.jobs.folder(first.id) / "log").read_text()

    def test_a_process_that_dies_fails_its_job(self, registry: Registry, base: Base) -> None:
        with JobQueue(registry, options(base)) as queue:
            job = a_job(queue, "one", base)
            queue.add(job)
            running = until(queue, job, lambda job: job.status == "running")
            assert running.process is not None
            os.kill(running.process[0], signal.SIGKILL)
            failed = until(queue, job, lambda job: job.ended)
        assert failed.error is not None and "ended by SIGKILL" in str(failed.error["message"])

    def test_a_job_for_another_base_fails(self, registry: Registry, base: Base) -> None:
        queue = JobQueue(registry, options(base))
        job = a_job(queue, "one", base, base_fingerprint="sha256:other")
        queue.jobs.save(job)
        with queue:
            failed = queue.jobs.get(job.id)
        assert failed.error is not None and failed.error["code"] == "base_changed"

    def test_an_adapter_made_meanwhile_is_not_replaced(self, registry: Registry, service: Service, base: Base) -> None:
        queue = JobQueue(registry, options(base))
        job = a_job(queue, "one", base, status="queued")
        queue.jobs.save(job)
        version = registry.import_(Path(service.registry.root) / "pirate", "one").version
        with queue:
            failed = until(queue, job, lambda job: job.ended)
        assert failed.error is not None and failed.error["code"] == "name_taken"
        assert registry.get("one").version == version

    def test_an_adapter_made_during_the_run_is_not_replaced(
        self, registry: Registry, service: Service, base: Base
    ) -> None:
        with JobQueue(registry, options(base)) as queue:
            job = a_job(queue, "one", base, n_epochs=20)
            queue.add(job)
            until(queue, job, lambda job: job.status == "running")
            before = registry.import_(Path(service.registry.root) / "pirate", "one")
            failed = until(queue, job, lambda job: job.ended)
        assert failed.error is not None and failed.error["code"] == "name_taken"
        after = registry.get("one")
        assert (after.version, after.manifest.sha256) == (before.version, before.manifest.sha256)

    def test_a_process_that_outlives_its_server_is_found_and_its_run_goes_on(
        self, registry: Registry, base: Base
    ) -> None:
        job = a_job(JobQueue(registry, []), "one", base)
        JobQueue(registry, []).jobs.save(job)
        code = (
            "import sys, time\nfrom loraserve.jobs import JobQueue\nfrom loraserve.registry import Registry\n"
            "with JobQueue(Registry(sys.argv[1], None, sys.argv[2]), sys.argv[3:]): time.sleep(600)"
        )
        arguments = [str(registry.root), base.fingerprint, *options(base)]
        with subprocess.Popen([sys.executable, "-c", code, *arguments]) as server:
            queue = JobQueue(registry, options(base))
            running = until(queue, job, lambda _: len(steps(queue, job)) > 3)
            server.kill()
        assert running.process is not None
        orphan = psutil.Process(running.process[0])
        assert orphan.is_running()
        with queue:
            until(queue, job, lambda job: job.status == "running" and job.process != running.process)
            assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
            assert until(queue, job, lambda job: job.ended).status == "succeeded"
        assert "resuming after step" in (queue.jobs.folder(job.id) / "log").read_text()

    def test_two_servers_do_not_train_the_same_jobs(self, registry: Registry, base: Base) -> None:
        with JobQueue(registry, options(base)) as queue:
            job = a_job(queue, "one", base)
            queue.add(job)
            with JobQueue(registry, options(base)) as other:
                assert other.jobs.get(job.id).id == job.id
                with pytest.raises(Conflict, match="another server trains"):
                    other.add(a_job(other, "two", base))
                with pytest.raises(Conflict, match="another server trains"):
                    other.cancel(job.id)
            queue.cancel(job.id)

    def test_the_queue_has_an_end(self, registry: Registry, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loraserve.jobs.queue.MAX_WAITING", 2)
        with JobQueue(registry, options(base)) as queue, contextlib.ExitStack() as stack:
            for name in ("one", "two"):
                job = a_job(queue, name, base)
                queue.add(job)
                stack.callback(queue.cancel, job.id)
            with pytest.raises(QueueFull):
                queue.add(a_job(queue, "three", base))


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "status"),
        [
            ([], 200),
            (["--host", "localhost"], 200),
            (["--no-training"], 403),
            (["--host", "0.0.0.0"], 403),
            (["--host", "0.0.0.0", "--training"], 200),
        ],
    )
    def test_trains_by_default_only_for_this_machine(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
    ) -> None:
        statuses = []

        class Once:
            url = "http://nowhere"

            def __init__(self, app: Flask, host: str, port: int) -> None:
                self.app = app

            def run_until_signal(self) -> None:
                statuses.append(self.app.test_client().get("/v1/fine_tuning/jobs").status_code)

        monkeypatch.setattr("loraserve.cli.serve.open_service", lambda *_, **__: contextlib.nullcontext(service))
        monkeypatch.setattr("loraserve.server.Server", Once)
        result = CliRunner().invoke(main, ["serve", *arguments])
        assert (result.exit_code, statuses) == (0, [status]), result.output

    def test_ends_a_run_in_order_when_it_is_stopped(self, base: Base, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "loraserve", "serve", "--port", "0", "--adapters-dir", str(tmp_path)]
        command += ["--base", str(base.path), "--max-model-len", "64", "--kv-memory", "1M"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, env=environment, **pipes) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].split()[0]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                job = start(client, "nova")
                wait_for(client, job.id, "running")
                while not any(message.startswith("Step 2:") for message in messages(client, job.id)):
                    time.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            assert server.stdout.read() == "" and server.wait(60) == 0
        folder = tmp_path / ".jobs" / job.id
        pid, _ = json.loads((folder / "job.json").read_text())["process"]
        assert not psutil.pid_exists(pid)
        assert "stopped by SIGTERM after step" in (folder / "log").read_text()
        assert (folder / "run" / ".training" / "nova" / "checkpoint.pt").exists()
