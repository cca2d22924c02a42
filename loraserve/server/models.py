"""GET /v1/models: the base and every adapter, as vLLM lists them."""

import itertools
import os
from typing import Any

from flask import Blueprint, Response, jsonify, request

from loraserve.errors import ModelNotFound
from loraserve.lora.peft import CONFIG_FILE
from loraserve.server.paging import cut, envelope, limit_of
from loraserve.server.state import State, current

routes = Blueprint("models", __name__)


@routes.get("/v1/models")
def list_models() -> Response:
    """The base first, then the adapters; no file of any of them is opened, so ten thousand are no trouble."""
    state, after = current(), request.args.get("after", "")
    adapters = state.names("" if after == state.base_name else after)
    ids = adapters if after else itertools.chain([state.base_name], adapters)
    page, has_more = cut((i for i in ids if _can_answer(state, i)), limit_of(request))
    cards = [base_card(state) if i == state.base_name else adapter_card(state, i) for i in page]
    return jsonify(envelope(cards, has_more))


@routes.get("/v1/models/<path:model>")
def show_model(model: str) -> Response:
    state = current()
    selection = state.select(model, None)
    if not selection.spec:
        return jsonify(base_card(state))
    if len(selection.spec) > 1:
        raise ModelNotFound(model, state.names(), param="model", hint="a blend has no entry of its own")
    name = selection.spec[0].name
    if not state.has(name):
        raise state.unknown(selection)
    state.registry.get(name)
    return jsonify(adapter_card(state, name))


def base_card(state: State) -> dict[str, Any]:
    return _card(state, state.base_name, root=str(state.base.path), parent=None, created=state.started)


def adapter_card(state: State, name: str) -> dict[str, Any]:
    root = f"{state.registry.root}/{name}"
    return _card(state, name, root=root, parent=state.base_name, created=_changed(root))


def _can_answer(state: State, model_id: str) -> bool:
    """Whether nothing is known against it; /v1/adapters lists those that are refused, with their problems."""
    return model_id == state.base_name or not state.registry.is_refused(model_id)


def _changed(root: str) -> int:
    try:
        return int(os.stat(f"{root}/{CONFIG_FILE}").st_mtime)
    except OSError:
        return 0


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
