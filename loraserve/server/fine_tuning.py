"""OpenAI's /v1/fine_tuning/jobs: train an adapter on an uploaded file, watch it, cancel it.

A job's adapter is named by `suffix` and answers as that model once the job has succeeded. A name that is in use is
refused, for the client means to find its own adapter there, and whoever uses the other one means to keep it.
"""

import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify, request

from loraserve.errors import Conflict, InvalidRequest, NotReady, QueueFull
from loraserve.jobs import Job, JobQueue
from loraserve.jobs.ids import new_id
from loraserve.jobs.job import PREFIX
from loraserve.lora.config import expand_targets, parse_targets
from loraserve.lora.spec import check_name
from loraserve.server.files import PURPOSE
from loraserve.server.job_schema import CreateJob, Hyperparameters
from loraserve.server.origin import same_origin
from loraserve.server.paging import cut, envelope, limit_of
from loraserve.server.payloads import event
from loraserve.server.problems import describe
from loraserve.server.schema import parse
from loraserve.server.state import State, current
from loraserve.train.options import DPO_BETA, TrainOptions

routes = Blueprint("fine_tuning", __name__)
PAGE = 20
"""Entries of a list, where no limit is asked for."""
METHODS = {"supervised": "sft", "dpo": "dpo"}
"""OpenAI's names of what `loraserve train` calls objectives."""
DPO_MULTIPLIER = 0.05
"""Preferences want lower rates than answers."""
LOOK_SECONDS = 0.25
"""How long a stream waits before it looks for new events, and whether the client is still there."""


@routes.post("/v1/fine_tuning/jobs")
def create_job() -> Response:
    state = current()
    queue = state.training()
    same_origin()
    body = parse(request, CreateJob)
    job = _job(state, queue, body)
    queue.add(job)
    return jsonify(_describe(job))


@routes.get("/v1/fine_tuning/jobs")
def list_jobs() -> Response:
    """A page of them, the newest first; `metadata[key]=value` keeps those with that."""
    jobs, args = current().training().jobs, request.args
    after = args.get("after")
    wanted = {key[len("metadata[") : -1]: value for key, value in args.items() if key.startswith("metadata[")}
    found = {job.id: job for job in jobs.iterate() if not after or job.id < after}
    page, has_more = cut(
        (i for i, job in found.items() if wanted.items() <= job.metadata.items()), limit_of(request, PAGE)
    )
    return jsonify(envelope([_describe(found[i]) for i in page], has_more))


@routes.get("/v1/fine_tuning/jobs/<job_id>")
def show_job(job_id: str) -> Response:
    return jsonify(_describe(current().training().jobs.get(job_id)))


@routes.post("/v1/fine_tuning/jobs/<job_id>/cancel")
def cancel_job(job_id: str) -> Response:
    queue = current().training()
    same_origin()
    return jsonify(_describe(queue.cancel(job_id)))


@routes.get("/v1/fine_tuning/jobs/<job_id>/events")
def list_events(job_id: str) -> Response:
    """A page of them, the newest first; with `stream=true` all of them, the oldest first, until the job has ended."""
    state, after = current(), request.args.get("after")
    jobs = state.training().jobs
    jobs.get(job_id)
    if _wants_stream():
        return _stream(state, job_id)
    events = {e["id"]: e for e in reversed(jobs.events(job_id)) if not after or e["id"] < after}
    page, has_more = cut(events, limit_of(request, PAGE))
    return jsonify(envelope([events[i] for i in page], has_more))


@routes.get("/v1/fine_tuning/jobs/<job_id>/checkpoints")
def list_checkpoints(job_id: str) -> Response:
    """None: a job publishes one adapter, at its end."""
    current().training().jobs.get(job_id)
    return jsonify(envelope([], False))


def _job(state: State, queue: JobQueue, body: CreateJob) -> Job:
    selection = state.select(body.model, None)
    if selection.spec:
        if not all(state.has(term.name) for term in selection.spec):
            raise state.unknown(selection)
        raise InvalidRequest(f"training starts from the base: give model {state.base_name!r}", param="model")
    for field in ("training_file", "validation_file"):
        if (file_id := getattr(body, field)) is not None and queue.files.get(file_id, param=field).purpose != PURPOSE:
            raise InvalidRequest(f"{file_id} is not a file for training", param=field)
    if body.validation_file is not None and body.val_split is not None:
        raise InvalidRequest("validation_file and val_split are two ways to the same; give one", param="val_split")
    if isinstance(body.targets, str):
        body.targets = parse_targets(body.targets)
    if body.targets is not None:
        try:
            expand_targets(body.targets, state.base.shapes)
        except InvalidRequest as error:
            error.param = "targets"
            raise
    job_id = new_id(PREFIX)
    name = f"ft-{job_id[-12:]}" if body.suffix is None else check_name(body.suffix, param="suffix")
    if name == state.base_name:
        raise Conflict(f"{name!r} is the base's name; choose another suffix", param="suffix")
    objective, asked = _method(body)
    return Job(
        id=job_id,
        created_at=int(time.time()),
        model=state.base_name,
        base_fingerprint=state.base.fingerprint,
        name=name,
        suffix=body.suffix,
        training_file=body.training_file,
        validation_file=body.validation_file,
        n_epochs=asked.n_epochs or TrainOptions.epochs,
        batch_size=asked.batch_size or TrainOptions.batch_size,
        learning_rate_multiplier=asked.learning_rate_multiplier or (DPO_MULTIPLIER if objective == "dpo" else 1.0),
        seed=TrainOptions.seed if body.seed is None else body.seed,
        rank=body.rank,
        alpha=body.alpha,
        targets=body.targets,
        rslora=body.rslora,
        dora=body.dora,
        lora_plus_ratio=body.lora_plus_ratio,
        val_split=body.val_split,
        objective=objective,
        beta=(asked.beta or DPO_BETA) if objective == "dpo" else None,
        metadata=body.metadata or {},
    )


def _method(body: CreateJob) -> tuple[str, Hyperparameters]:
    """The objective, as `loraserve train` has it, and the hyperparameters."""
    kind = body.method.type if body.method else "supervised"
    given = {name: getattr(body.method, name) for name in METHODS} if body.method else {}
    if stray := [name for name, settings in given.items() if settings and name != kind]:
        raise InvalidRequest(f"method is {kind}, but has settings of {stray[0]}", param=f"method.{stray[0]}")
    settings = given.get(kind)
    inner = settings.hyperparameters if settings else None
    if inner and body.hyperparameters:
        raise InvalidRequest(
            "hyperparameters and method both give hyperparameters; keep method", param="hyperparameters"
        )
    asked = inner or body.hyperparameters or Hyperparameters()
    if asked.beta is not None and kind != "dpo":
        where = f"method.{kind}.hyperparameters.beta" if inner else "hyperparameters.beta"
        raise InvalidRequest("beta goes with method dpo only", param=where)
    return METHODS[kind], asked


def _wants_stream() -> bool:
    value = request.args.get("stream", "false").lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"stream must be true or false, not {value[:60]!r}", param="stream")
    return value == "true"


def _stream(state: State, job_id: str) -> Response:
    if not state.watchers.acquire(blocking=False):
        raise QueueFull("too many clients watch jobs; ask for the events without stream", retry_after=5)
    gone = request.environ.get("waitress.client_disconnected", lambda: False)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = Response(_follow(state, job_id, gone), 200, headers, "text/event-stream")
    response.call_on_close(state.watchers.release)
    return response


def _follow(state: State, job_id: str, gone: Any) -> Iterator[bytes]:
    jobs, seen = state.training().jobs, 0
    while not gone():
        ended = jobs.get(job_id).ended  # before the events, so that none of them is missed
        events = jobs.events(job_id)
        yield from map(event, events[seen:])
        seen = len(events)
        if ended:
            yield event("[DONE]")
            return
        if state.closing.wait(LOOK_SECONDS):
            yield event(describe(NotReady("the server is shutting down")))
            return


def _describe(job: Job) -> dict[str, Any]:
    hyperparameters: dict[str, Any] = {
        "n_epochs": job.n_epochs,
        "batch_size": job.batch_size,
        "learning_rate_multiplier": job.learning_rate_multiplier,
    }
    kind = next(name for name, objective in METHODS.items() if objective == job.objective)
    if kind == "dpo":
        hyperparameters["beta"] = job.beta
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "organization_id": "loraserve",
        "status": job.status,
        "error": job.error,
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "user_provided_suffix": job.suffix,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "hyperparameters": hyperparameters,
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "seed": job.seed,
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.metadata,
        "rank": job.rank,
        "alpha": job.alpha,
        "targets": job.targets,
        "rslora": job.rslora,
        "dora": job.dora,
        "lora_plus_ratio": job.lora_plus_ratio,
        "val_split": job.val_split,
    }
