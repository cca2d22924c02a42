"""The adapters by HTTP: list, describe, upload, pin, remove, merge, and vLLM's load and unload.

An upload is a multipart form with `adapter_config.json`, one `.safetensors` file, and the field `name`; a
`loraserve.json` may tell where the adapter comes from. Whatever is refused leaves the registry as it was. Unloading
takes an adapter out of service and out of memory; its files stay.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import UnsupportedMediaType

from loraserve.errors import AdapterNotFound, AdapterRefused, Conflict, InvalidRequest, LoraserveError
from loraserve.lora.spec import check_name
from loraserve.registry import Record
from loraserve.server.origin import same_origin
from loraserve.server.paging import cut, envelope, limit_of
from loraserve.server.schema import LoadAdapter, PatchAdapter, UnloadAdapter, parse
from loraserve.server.state import State, current

routes = Blueprint("adapters", __name__)
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "loraserve.json"
UPLOAD_LIMIT = "MAX_UPLOAD_BYTES"
PAGE = 100
"""Entries of the list, where no limit is asked for."""


@routes.get("/v1/adapters")
def list_adapters() -> Response:
    """A page of them; `q` keeps those with that text in their names."""
    state, args = current(), request.args
    names, has_more = cut(state.names(args.get("after", ""), args.get("q", "")), limit_of(request, PAGE))
    return jsonify(envelope([_entry(state, name) for name in names], has_more))


@routes.get("/v1/adapters/<path:name>")
def show_adapter(name: str) -> Response:
    state = current()
    _find(state, name)
    return jsonify(_describe(state, state.registry.get(name)))


@routes.patch("/v1/adapters/<path:name>")
def pin_adapter(name: str) -> Response:
    """Keep an adapter in memory until the server ends, or let it go like any other."""
    state, body = current(), parse(request, PatchAdapter)
    _find(state, name)
    if body.pinned:
        state.service.pin(name)
        _still_in_service(state, name)
    else:
        state.service.unpin(name)
    return jsonify(_describe(state, state.registry.get(name)))


@routes.post("/v1/adapters")
def upload_adapter() -> tuple[Response, int]:
    state = current()
    same_origin()
    request.max_content_length = current_app.config[UPLOAD_LIMIT]
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType(
            f"upload a multipart/form-data body with the field name and the files {CONFIG} and {WEIGHTS}"
        )
    name = _free_name(state, request.form.get("name"), "name", replace=_flag("replace"))
    files: dict[str, FileStorage] = {}
    for _, file in request.files.items(multi=True):
        files[_role(file, files)] = file
    if missing := [part for part in (CONFIG, WEIGHTS) if part not in files]:
        raise InvalidRequest(f"the upload lacks {' and '.join(missing)}", param="file")
    with tempfile.TemporaryDirectory(prefix="loraserve-upload-") as folder:
        for part, file in files.items():
            file.save(Path(folder) / part)
        record = _publish(state, Path(folder), name)
    return jsonify(_describe(state, record)), 201


@routes.delete("/v1/adapters/<path:name>")
def remove_adapter(name: str) -> Response:
    state = current()
    check_name(name)
    if not state.registry.has(name):  # one taken out of service can be removed too
        raise AdapterNotFound(name, state.registry.iterate())
    state.registry.remove(name)
    state.service.unload(name)
    state.unloaded.discard(name)
    return jsonify(id=name, object="adapter", deleted=True)


@routes.post("/v1/adapters/<path:name>/merge")
def merge_adapter(name: str) -> Response:
    """Let an adapter answer from merged layers of its own; answers when they are in use."""
    state = current()
    same_origin()
    _find(state, name)
    merged = state.service.merge(name)
    _still_in_service(state, name)
    return jsonify(_describe(state, state.registry.get(name)) | {"merge": merged.to_dict()})


@routes.post("/v1/adapters/<path:name>/unmerge")
def unmerge_adapter(name: str) -> Response:
    state = current()
    same_origin()
    _find(state, name)
    state.service.unmerge(name)
    return jsonify(_entry(state, name))


@routes.post("/v1/load_lora_adapter")
def load_adapter() -> Response:
    """Bring an adapter from a directory of the server's into service, under a name."""
    state, body = current(), parse(request, LoadAdapter)
    path = Path(os.path.expanduser(body.lora_path))
    if not os.path.exists(path):
        raise AdapterNotFound(body.lora_path, param="lora_path", hint="lora_path is a directory on the server")
    name = _free_name(state, body.lora_name, "lora_name", replace=body.load_inplace or body.lora_name in state.unloaded)
    if path.resolve() == (Path(state.registry.root) / name).resolve():
        _describe(state, state.registry.get(name))
        state.unloaded.discard(name)
    else:
        _publish(state, path, name)
    return Response(f"Success: LoRA adapter '{name}' added successfully.", content_type="text/plain; charset=utf-8")


@routes.post("/v1/unload_lora_adapter")
def unload_adapter() -> Response:
    """Take an adapter out of service until it is loaded again or the server restarts."""
    state, body = current(), parse(request, UnloadAdapter)
    name = body.lora_name
    _find(state, name, "lora_name")
    state.unloaded.add(name)
    state.service.unload(name)
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", content_type="text/plain; charset=utf-8")


def _find(state: State, name: str, param: str | None = None) -> None:
    check_name(name, param=param)
    if not state.has(name):
        raise AdapterNotFound(name, state.names(), param=param)


def _still_in_service(state: State, name: str) -> None:
    """Raise AdapterNotFound, with its memory free again, for an adapter taken out of service while it was prepared."""
    if not state.has(name):
        state.service.unload(name)
        _find(state, name)


def _free_name(state: State, name: str | None, param: str, *, replace: bool) -> str:
    if not name:
        raise InvalidRequest(f"the field {param} is required: it will be the adapter's name", param=param)
    check_name(name, param=param)
    if name == state.base_name:
        raise Conflict(f"{name!r} is the base's name; choose another", param=param)
    if state.registry.has(name) and not replace:
        flag = "load_inplace" if param == "lora_name" else "replace"
        raise Conflict(f"adapter {name!r} exists already; {flag}=true makes this its new version", param=param)
    return name


def _publish(state: State, folder: Path, name: str) -> Record:
    """Import a PEFT directory, as a new version where the name exists, and put it into service."""
    record = state.registry.import_(folder, name)
    state.unloaded.discard(name)
    return record


def _flag(field: str) -> bool:
    value = request.form.get(field, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{field} must be true or false, not {value!r}", param=field)
    return value in ("true", "1")


def _role(file: FileStorage, files: dict[str, FileStorage]) -> str:
    """Which part of an adapter a file is."""
    given = Path((file.filename or "").replace("\\", "/")).name
    if given in (CONFIG, MANIFEST):
        part = given
    elif given.endswith(".safetensors"):
        part = WEIGHTS
    else:
        raise InvalidRequest(
            f"unexpected file {given!r}: only {CONFIG}, one .safetensors and {MANIFEST} are taken", param="file"
        )
    if part in files:
        raise InvalidRequest(f"two files for {part}: an upload is one adapter", param="file")
    return part


def _entry(state: State, name: str) -> dict[str, Any]:
    """An adapter of the list; one that cannot be used stands there with its problems."""
    try:
        return _describe(state, state.registry.get(name))
    except AdapterRefused as error:
        return {"id": name, "object": "adapter", "status": "refused", "problems": error.problems}
    except LoraserveError as error:
        return {"id": name, "object": "adapter", "status": "refused", "problems": [str(error)]}


def _describe(state: State, record: Record) -> dict[str, Any]:
    manifest, config = record.manifest, record.config
    merged = state.service.merges.get(record.name)
    return {
        "id": record.name,
        "object": "adapter",
        "status": "ready",
        "loaded": state.service.is_loaded(record.name),
        "pinned": state.service.is_pinned(record.name),
        "merged": merged is not None,
        "merged_bytes": merged.num_bytes if merged else 0,
        "version": record.version,
        "created": record.created,
        "description": manifest.description,
        "rank": record.rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": config.target_modules,
        "num_parameters": record.num_parameters,
        "size_bytes": record.size_bytes,
        "sha256": manifest.sha256,
        "base_name": manifest.base_name,
        "base_fingerprint": manifest.base_fingerprint,
        "metrics": manifest.metrics,
        "warnings": record.warnings,
        "base": state.base_name,
    }
