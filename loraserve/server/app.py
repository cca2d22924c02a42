"""Builds the Flask app over a running engine: API, health, metrics and the chat page."""

from flask import Flask, Response, jsonify, request
from prometheus_client import CONTENT_TYPE_LATEST

from loraserve.engine.service import Service
from loraserve.errors import NotReady
from loraserve.jobs import JobQueue
from loraserve.lora.spec import parse_spec
from loraserve.server import adapters, completions, files, fine_tuning, models, problems
from loraserve.server.metrics import Metrics
from loraserve.server.state import EXTENSION, State, current

MAX_BODY_BYTES = 16 * 2**20
MAX_UPLOAD_BYTES = 512 * 2**20
MAX_FILE_BYTES = 100 * 2**20
PAGE_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def create_app(
    service: Service,
    *,
    default_adapter: str | None = None,
    served_name: str | None = None,
    queue: JobQueue | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Flask:
    """Build the WSGI app.

    Args:
        service: the engine; its thread may still be starting, `/ready` tells.
        default_adapter: the SPEC that answers a request which names neither a model nor an adapter.
        served_name: the base's name in the API; by default its own.
        queue: trains what clients ask for; without one they may not.
        max_body_bytes: the largest JSON body.
        max_upload_bytes: the largest adapter upload.
        max_file_bytes: the largest training file.

    Raises:
        InvalidRequest, AdapterNotFound: `default_adapter` is no SPEC, or names an adapter that is not there.
    """
    app = Flask(__name__, static_folder="web", static_url_path="/web")
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.config["MAX_FORM_PARTS"] = 16
    app.config[adapters.UPLOAD_LIMIT] = max_upload_bytes
    app.config[files.FILE_LIMIT] = max_file_bytes
    metrics = Metrics(service.stats)
    default = parse_spec(default_adapter, param="default_adapter")
    for term in default:
        service.registry.get(term.name)
    app.extensions[EXTENSION] = State(service, served_name or service.base.name, default, metrics, queue)
    problems.install(app)
    metrics.install(app)
    for module in (completions, models, adapters, files, fine_tuning):
        app.register_blueprint(module.routes)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok")

    @app.get("/ready")
    def ready() -> Response:
        state = current()
        if state.closing.is_set() or not service.ready:
            raise NotReady("the engine is not ready to answer")
        return jsonify(status="ready")

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.text(), content_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        if request.path == "/" or request.path.startswith("/web/"):
            response.headers["Content-Security-Policy"] = PAGE_POLICY
            response.headers["Cache-Control"] = "no-cache"
        return response

    return app
