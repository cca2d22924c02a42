"""GET /v1/models: the base and every adapter, as vLLM lists them."""

from typing import Any

from flask import Blueprint, Response, jsonify

from loraserve.errors import LoraserveError, ModelNotFound
from loraserve.registry import Record
from loraserve.server.state import State, current

routes = Blueprint("models", __name__)


@routes.get("/v1/models")
def list_models() -> Response:
    state = current()
    cards = [base_card(state)]
    for name in state.names():
        try:
            cards.append(adapter_card(state, state.registry.get(name)))
        except LoraserveError:
            continue  # it cannot answer; /v1/adapters lists it with its problems
    return jsonify(object="list", data=cards)


@routes.get("/v1/models/<path:model>")
def show_model(model: str) -> Response:
    state = current()
    selection = state.select(model, None)
    if not selection.spec:
        return jsonify(base_card(state))
    if len(selection.spec) > 1:
        raise ModelNotFound(model, state.names(), param="model", hint="a blend has no entry of its own")
    name = selection.spec[0].name
    if name not in state.names():
        raise state.unknown(selection)
    return jsonify(adapter_card(state, state.registry.get(name)))


def base_card(state: State) -> dict[str, Any]:
    return _card(state, state.base_name, root=str(state.base.path), parent=None, created=state.started)


def adapter_card(state: State, record: Record) -> dict[str, Any]:
    return _card(state, record.name, root=str(record.path), parent=state.base_name, created=record.created)


def _card(state: State, model_id: str, *, root: str, parent: str | None, created: int) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "loraserve",
        "root": root,
        "parent": parent,
        "max_model_len": state.service.max_model_len,
    }
