"""OpenAI's /v1/files: upload training files, list, read and delete them and the metrics of finished jobs."""

from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request, send_file
from werkzeug.exceptions import UnsupportedMediaType

from loraserve.errors import Conflict, InvalidRequest
from loraserve.jobs import StoredFile
from loraserve.server.origin import same_origin
from loraserve.server.paging import MAX_LIMIT, cut, envelope, limit_of
from loraserve.server.state import current

routes = Blueprint("files", __name__)
FILE_LIMIT = "MAX_FILE_BYTES"
PURPOSE = "fine-tune"


@routes.post("/v1/files")
def upload_file() -> Response:
    queue = current().training()
    same_origin()
    request.max_content_length = current_app.config[FILE_LIMIT]
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType("upload a multipart/form-data body with the fields file and purpose")
    if request.form.get("purpose") != PURPOSE:
        raise InvalidRequest(f"purpose must be {PURPOSE!r}: files are taken for training only", param="purpose")
    if any(field.startswith("expires_after") for field in request.form):
        raise InvalidRequest("expires_after is not supported: files stay until they are deleted", param="expires_after")
    file = request.files.get("file")
    if file is None:
        raise InvalidRequest("the field file is required, with the dialogues to train on", param="file")
    return jsonify(_describe(queue.files.add(file.stream, file.filename or "", PURPOSE)))


@routes.get("/v1/files")
def list_files() -> Response:
    """A page of them, the newest first unless `order` says otherwise; `purpose` keeps those of one purpose."""
    files, args = current().training().files, request.args
    order, after, purpose = args.get("order", "desc"), args.get("after"), args.get("purpose")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be 'asc' or 'desc', not {order[:60]!r}", param="order")
    ids = list(files.iterate())
    if order == "asc":
        ids.reverse()
    if after:
        ids = [i for i in ids if (i > after if order == "asc" else i < after)]
    wanted = (i for i in ids if purpose is None or files.get(i).purpose == purpose)
    page, has_more = cut(wanted, limit_of(request, MAX_LIMIT))
    return jsonify(envelope([_describe(files.get(i)) for i in page], has_more))


@routes.get("/v1/files/<file_id>")
def show_file(file_id: str) -> Response:
    return jsonify(_describe(current().training().files.get(file_id)))


@routes.get("/v1/files/<file_id>/content")
def read_file(file_id: str) -> Response:
    files = current().training().files
    name = files.get(file_id).filename
    path = files.path(file_id).absolute()
    return send_file(path, mimetype="application/octet-stream", as_attachment=True, download_name=name)


@routes.delete("/v1/files/<file_id>")
def delete_file(file_id: str) -> Response:
    queue = current().training()
    queue.files.get(file_id)
    if job := queue.reader_of(file_id):
        raise Conflict(f"job {job} still needs {file_id}; wait for it, or cancel it")
    queue.files.remove(file_id)
    return jsonify(id=file_id, object="file", deleted=True)


def _describe(file: StoredFile) -> dict[str, Any]:
    return {**asdict(file), "object": "file", "status": "processed"}
