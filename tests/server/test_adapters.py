"""The adapters' routes: list, describe, upload, remove, and vLLM's load and unload."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from loraserve.base.load import Base
from loraserve.engine.service import Service
from loraserve.registry import Registry
from loraserve.server import create_app
from tests.server.conftest import CHAINS, text_of, write_adapter
from tests.server.test_bad_requests import expect

FILES = ("adapter_config.json", "adapter_model.safetensors")
NAMES = sorted(set(CHAINS) - {"base"})


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    """An engine of its own, for its registry changes."""
    return make_service()


@pytest.fixture
def second(base: Base, tmp_path: Path) -> Path:
    """A PEFT directory outside the registry that speaks like the poet."""
    return write_adapter(tmp_path / "second", base, CHAINS["poet"][0], r=2)


def upload(client: FlaskClient, folder: Path, name: str | None, **form: str) -> TestResponse:
    files = [(io.BytesIO((folder / file).read_bytes()), file) for file in FILES]
    data: dict[str, Any] = {"file": files, **form} | ({} if name is None else {"name": name})
    return client.post("/v1/adapters", data=data)


def ask(client: FlaskClient, adapter: str) -> TestResponse:
    messages = [{"role": "user", "content": "Who are you?"}]
    return client.post("/v1/chat/completions", json={"messages": messages, "adapter": adapter})


def says(client: FlaskClient, adapter: str) -> str:
    return ask(client, adapter).json["choices"][0]["message"]["content"]


def names(client: FlaskClient) -> list[str]:
    return [entry["id"] for entry in client.get("/v1/adapters").json["data"]]


def test_the_list_describes_every_adapter(client: FlaskClient) -> None:
    says(client, "poet")
    body = client.get("/v1/adapters").json
    assert body["object"] == "list"
    entries = {entry["id"]: entry for entry in body["data"]}
    assert sorted(entries) == NAMES
    poet = entries["poet"]
    assert poet == client.get("/v1/adapters/poet").json
    assert poet["status"] == "ready" and poet["base"] == "tiny"
    assert poet["loaded"] and not entries["dice"]["loaded"]
    assert sorted(poet["target_modules"]) == ["k_proj", "lm_head"]
    assert poet["rank"] != entries["dice"]["rank"] and poet["num_parameters"] > 0 and poet["size_bytes"] > 0


def test_a_directory_dropped_in_is_served_without_a_restart(client: FlaskClient, service: Service, base: Base) -> None:
    assert ask(client, "newcomer").status_code == 404
    write_adapter(service.registry.root / "newcomer", base, CHAINS["pirate"][0])
    assert says(client, "newcomer") == text_of("pirate")
    assert "newcomer" in names(client)


def test_a_broken_adapter_is_listed_with_its_problems_and_not_as_a_model(
    client: FlaskClient, service: Service, base: Base
) -> None:
    folder = write_adapter(service.registry.root / "broken", base, CHAINS["pirate"][0])
    (folder / FILES[1]).write_bytes(b"not safetensors")
    entry = next(entry for entry in client.get("/v1/adapters").json["data"] if entry["id"] == "broken")
    assert entry["status"] == "refused" and entry["problems"]
    assert "broken" not in [model["id"] for model in client.get("/v1/models").json["data"]]
    assert expect(ask(client, "broken"), 422, "adapter_refused", None)["problems"]


def test_pages_of_models_go_past_those_that_are_refused(client: FlaskClient, service: Service, base: Base) -> None:
    for name in ("ninja", "noble"):
        folder = write_adapter(service.registry.root / name, base, CHAINS["pirate"][0])
        (folder / FILES[1]).write_bytes(b"not safetensors")
        expect(ask(client, name), 422, "adapter_refused", None)
    found, page = [], {"has_more": True, "last_id": ""}
    while page["has_more"]:
        page = client.get("/v1/models", query_string={"limit": 1, "after": page["last_id"]}).json
        assert len(page["data"]) == 1
        found.append(page["last_id"])
    assert found == ["tiny", *NAMES]


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_that_only_the_load_reveals_has_its_status(
    client: FlaskClient, service: Service, base: Base, stream: bool
) -> None:
    size = base.config.vocab_size
    spoilt = {"base_model.model.lm_head.lora_A.weight": torch.full((1, size), float("nan"))}
    write_adapter(service.registry.root / "spoilt", base, CHAINS["pirate"][0], **spoilt)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "n": 2}
    for spec in ("spoilt", "poet:0.5+spoilt:0.5"):
        response = client.post("/v1/chat/completions", json={**body, "adapter": spec})
        assert expect(response, 422, "adapter_refused", None, "NaN")["problems"]
    expect(client.patch("/v1/adapters/spoilt", json={"pinned": True}), 422, "adapter_refused", None, "NaN")
    assert says(client, "poet") == text_of("poet")


def test_an_adapter_is_pinned_and_let_go(client: FlaskClient, service: Service) -> None:
    assert not client.get("/v1/adapters/poet").json["pinned"]
    entry = client.patch("/v1/adapters/poet", json={"pinned": True}).json
    assert (entry["id"], entry["pinned"], entry["loaded"]) == ("poet", True, True)
    assert [e["id"] for e in client.get("/v1/adapters").json["data"] if e["pinned"]] == ["poet"]
    assert service.stats()["adapters_pinned"] == 1
    assert not client.patch("/v1/adapters/poet", json={"pinned": False}).json["pinned"]
    expect(client.patch("/v1/adapters/poet", json={}), 400, "invalid_request", "pinned")
    expect(client.patch("/v1/adapters/poet", json={"pinned": "yes"}), 400, "invalid_request", "pinned")
    expect(client.patch("/v1/adapters/priate", json={"pinned": True}), 404, "adapter_not_found", None, "'pirate'")
    client.patch("/v1/adapters/poet", json={"pinned": True})
    assert client.delete("/v1/adapters/poet").status_code == 200 and service.stats()["adapters_pinned"] == 0


def test_an_adapter_larger_than_the_memory_for_adapters_is_refused(make_service: Callable[..., Service]) -> None:
    client = create_app(make_service(adapter_memory=1000)).test_client()
    expect(ask(client, "poet"), 400, "invalid_request", "adapter", "--adapter-memory")


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/models"])
def test_lists_come_by_pages(client: FlaskClient, path: str) -> None:
    wanted = ["tiny"] * (path == "/v1/models") + NAMES
    whole = client.get(path).json
    assert [entry["id"] for entry in whole["data"]] == wanted and not whole["has_more"]
    found, after = [], ""
    while True:
        page = client.get(path, query_string={"limit": 2, **({"after": after} if after else {})}).json
        ids = [entry["id"] for entry in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[0], ids[-1]) and len(ids) <= 2
        found += ids
        after = ids[-1]
        if not page["has_more"]:
            break
    assert found == wanted
    assert client.get(path, query_string={"after": wanted[-1]}).json == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None,
    }  # fmt: skip
    assert client.get(path, query_string={"after": "poer"}).json["first_id"] == "poet", "one that is not there, too"
    for limit in ("0", "-1", "x", "1001", "", "1e2", "٣", "9" * 5000, "00000000111000000", "000000001" + "0" * 5000):
        expect(client.get(path, query_string={"limit": limit}), 400, "invalid_request", "limit")


def test_a_list_is_searched(client: FlaskClient) -> None:
    def found(query: str) -> list[str]:
        return [entry["id"] for entry in client.get("/v1/adapters", query_string={"q": query}).json["data"]]

    assert found("IR") == ["pirate"] and found("e") == [n for n in NAMES if "e" in n] and found("zzz") == []
    client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    assert found("ir") == []


def test_thousands_of_adapters_are_listed_and_named_without_opening_their_files(
    client: FlaskClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2000):
        folder = service.registry.root / f"many-{i:05}"
        folder.mkdir()
        (folder / FILES[0]).write_text("{}")
    says(client, "poet")
    opened: list[str] = []
    get = Registry.get
    monkeypatch.setattr(Registry, "get", lambda self, name: opened.append(name) or get(self, name))
    monkeypatch.setattr(Registry, "names", lambda self: pytest.fail("all were looked for"))
    assert len(client.get("/v1/models").json["data"]) == 2001 + len(NAMES) and not opened
    assert says(client, "poet") == text_of("poet") and opened == ["poet"]
    assert len(client.get("/v1/adapters").json["data"]) == 100 and len(opened) == 101
    looked: list[str] = []
    monkeypatch.setattr(Registry, "iterate", lambda self, *args: looked.append("all") or iter(()))
    client.get("/v1/adapters/poet")
    client.get("/v1/models/poet")
    client.patch("/v1/adapters/poet", json={"pinned": False})
    client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
    client.delete("/v1/adapters/pirate")
    assert not looked
    expect(client.get("/v1/adapters/many-0000x"), 404, "adapter_not_found", None)


def test_an_upload_is_served_at_once(client: FlaskClient, second: Path) -> None:
    response = upload(client, second, "bard")
    assert response.status_code == 201, response.text
    assert response.json["id"] == "bard" and response.json["version"] == 1 and response.json["rank"] == 2
    assert says(client, "bard") == text_of("poet")


def test_an_upload_may_bring_its_origin(client: FlaskClient, second: Path) -> None:
    origin = json.dumps({"description": "by hand", "base_name": "elsewhere"}).encode()
    files = [(io.BytesIO((second / file).read_bytes()), file) for file in FILES]
    data = {"name": "bard", "file": [*files, (io.BytesIO(origin), "loraserve.json")]}
    response = client.post("/v1/adapters", data=data)
    assert response.status_code == 201, response.text
    assert (response.json["description"], response.json["base_name"]) == ("by hand", "elsewhere")


def test_an_upload_replaces_only_when_told_to(client: FlaskClient, second: Path) -> None:
    expect(upload(client, second, "pirate"), 409, "conflict", "name", "replace")
    assert says(client, "pirate") == text_of("pirate")
    assert upload(client, second, "pirate", replace="true").status_code == 201
    assert says(client, "pirate") == text_of("poet")


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden", "", "base", "x" * 65, "𠮷" * 64, "a\x00b", "-rf"])
def test_an_upload_cannot_leave_the_registry(client: FlaskClient, service: Service, second: Path, name: str) -> None:
    before = sorted(service.registry.root.parent.iterdir())
    expect(upload(client, second, name), 400, "invalid_request", "name")
    assert names(client) == NAMES and sorted(service.registry.root.parent.iterdir()) == before


def test_an_upload_without_a_name_or_a_file_says_what_is_missing(client: FlaskClient, second: Path) -> None:
    expect(upload(client, second, None), 400, "invalid_request", "name")
    config = {"name": "half", "file": [(io.BytesIO(b"{}"), FILES[0])]}
    expect(client.post("/v1/adapters", data=config), 400, "invalid_request", "file", "adapter_model.safetensors")
    pickle = {"name": "half", "file": [(io.BytesIO(b"{}"), FILES[0]), (io.BytesIO(b"x"), "adapter_model.bin")]}
    expect(client.post("/v1/adapters", data=pickle), 400, "invalid_request", "file", "adapter_model.bin")
    expect(client.post("/v1/adapters", json={"name": "half"}), 415, "unsupported_media_type", None, "multipart")
    assert names(client) == NAMES


def test_a_bad_upload_is_refused_whole(client: FlaskClient, base: Base, tmp_path: Path) -> None:
    size = base.config.vocab_size
    prefix = "base_model.model.lm_head.lora_"
    spoiled = {
        "nan": {f"{prefix}A.weight": torch.full((1, size), float("nan"))},
        "shape": {f"{prefix}B.weight": torch.ones(size + 1, 1)},
    }
    for name, tensors in spoiled.items():
        folder = write_adapter(tmp_path / name, base, CHAINS["poet"][0], **tensors)
        error = expect(upload(client, folder, name), 422, "adapter_refused", None, "lm_head")
        assert error["problems"]
    (folder / FILES[1]).write_bytes((folder / FILES[1]).read_bytes()[:100])
    expect(upload(client, folder, "truncated"), 422, "adapter_refused", None)
    (folder / FILES[0]).write_text("{")
    expect(upload(client, folder, "config"), 422, "adapter_refused", None)
    assert names(client) == NAMES


def test_an_upload_too_large_is_refused(service: Service, second: Path) -> None:
    client = create_app(service, max_upload_bytes=1000).test_client()
    expect(upload(client, second, "bard"), 413, "request_entity_too_large", None)


def test_an_upload_may_be_larger_than_other_bodies(service: Service, second: Path) -> None:
    client = create_app(service, max_body_bytes=1000).test_client()
    assert upload(client, second, "bard").status_code == 201


def test_another_sites_page_cannot_upload(client: FlaskClient, second: Path) -> None:
    files = [(io.BytesIO((second / file).read_bytes()), file) for file in FILES]
    data = {"name": "evil", "file": files}
    response = client.post("/v1/adapters", data=data, headers={"Origin": "https://evil.example"})
    expect(response, 403, "forbidden", None)
    assert names(client) == NAMES


def test_delete_removes_an_adapter(client: FlaskClient, service: Service) -> None:
    says(client, "poet")
    assert client.delete("/v1/adapters/poet").json == {"id": "poet", "object": "adapter", "deleted": True}
    assert "poet" not in names(client) and "poet" not in service.loaded()
    expect(ask(client, "poet"), 404, "adapter_not_found", "adapter")
    expect(client.delete("/v1/adapters/poet"), 404, "adapter_not_found", None)


def test_delete_removes_an_unloaded_adapter(client: FlaskClient, service: Service, second: Path) -> None:
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}).status_code == 200
    assert client.delete("/v1/adapters/poet").status_code == 200
    assert "poet" not in service.registry.names()
    assert upload(client, second, "poet").status_code == 201, "and its name is free again"
    assert says(client, "poet") == text_of("poet")


@pytest.mark.parametrize("name", ["..", "../adapters0", "%2e%2e", "%2e%2e%2f%2e%2e", "pirate/../poet", "a%00b"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_name_that_climbs_is_no_adapter(client: FlaskClient, service: Service, method: str, name: str) -> None:
    response = client.open(f"/v1/adapters/{name}", method=method)
    assert response.status_code in (400, 404, 405) and response.json["error"]["message"]
    assert names(client) == NAMES


def test_vllms_load_and_unload(client: FlaskClient, second: Path) -> None:
    load = {"lora_name": "bard", "lora_path": str(second)}
    response = client.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'bard' added successfully.")
    assert says(client, "bard") == text_of("poet")
    assert "bard" in [model["id"] for model in client.get("/v1/models").json["data"]]
    expect(client.post("/v1/load_lora_adapter", json=load), 409, "conflict", "lora_name", "load_inplace")
    assert client.post("/v1/load_lora_adapter", json={**load, "load_inplace": True}).status_code == 200
    assert client.get("/v1/adapters/bard").json["version"] == 2

    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "bard"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'bard' removed successfully.")
    expect(ask(client, "bard"), 404, "adapter_not_found", "adapter")
    expect(client.get("/v1/models/bard"), 404, "model_not_found", "model")
    expect(client.post("/v1/unload_lora_adapter", json={"lora_name": "bard"}), 404, "adapter_not_found", "lora_name")
    assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert says(client, "bard") == text_of("poet")


@pytest.mark.parametrize("what", ["pin", "merge"])
def test_unloading_wins_over_what_was_asked_for_before_it(
    client: FlaskClient, service: Service, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    begin = getattr(service, what)

    def queued(name: str) -> object:
        """As if it had waited behind another while the adapter was unloaded."""
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        return begin(name)

    with monkeypatch.context() as patch:
        patch.setattr(service, what, queued)
        if what == "pin":
            response = client.patch("/v1/adapters/pirate", json={"pinned": True})
        else:
            response = client.post("/v1/adapters/pirate/merge")
    expect(response, 404, "adapter_not_found", None)
    assert not service.is_pinned("pirate") and not service.is_loaded("pirate") and not service.merges.current()


def test_an_unloaded_adapter_keeps_its_files_and_can_come_back(client: FlaskClient, service: Service) -> None:
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}).status_code == 200
    assert ask(client, "pirate").status_code == 404 and "pirate" not in names(client)
    assert (service.registry.root / "pirate" / FILES[1]).exists()
    back = {"lora_name": "pirate", "lora_path": str(service.registry.root / "pirate")}
    assert client.post("/v1/load_lora_adapter", json=back).status_code == 200
    assert says(client, "pirate") == text_of("pirate")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"lora_name": "x"}, 400, "invalid_request", "lora_path"),
        ({"lora_path": "/tmp"}, 400, "invalid_request", "lora_name"),
        ({"lora_name": "", "lora_path": "/tmp"}, 400, "invalid_request", "lora_name"),
        ({"lora_name": "../x", "lora_path": "/tmp"}, 400, "invalid_request", "lora_name"),
        ({"lora_name": "tiny", "lora_path": "/tmp"}, 409, "conflict", "lora_name"),
        ({"lora_name": "x", "lora_path": "/nowhere/at/all"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_name": "x", "lora_path": "a\x00b"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_name": "x", "lora_path": "~nobody-here/x"}, 404, "adapter_not_found", "lora_path"),
        ({"lora_name": "x", "lora_path": "/" + "x" * 5000}, 404, "adapter_not_found", "lora_path"),
        ({"lora_name": "x", "lora_path": "/proc"}, 422, "adapter_refused", None),
    ],
)
def test_a_load_that_cannot_be(
    client: FlaskClient, fields: dict[str, str], status: int, code: str, param: str | None
) -> None:
    expect(client.post("/v1/load_lora_adapter", json=fields), status, code, param)
    assert names(client) == NAMES


def test_models_are_listed_as_vllm_lists_them(client: FlaskClient, service: Service) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json["data"]}
    assert sorted(cards) == sorted(["tiny", *NAMES])
    assert cards["tiny"]["parent"] is None and cards["tiny"]["max_model_len"] == service.max_model_len
    assert cards["pirate"]["parent"] == "tiny" and Path(cards["pirate"]["root"]).is_dir()
    for model, card in (("tiny", "tiny"), ("pirate", "pirate"), ("tiny:pirate", "pirate")):
        assert client.get(f"/v1/models/{model}").json == cards[card]
    expect(client.get("/v1/models/priate"), 404, "model_not_found", "model", "did you mean 'pirate'?")
    expect(client.get("/v1/models/a/b"), 404, "model_not_found", "model")


def test_the_default_adapter_answers_requests_that_name_nobody(service: Service) -> None:
    client = create_app(service, default_adapter="pirate", served_name="mini").test_client()
    body = json.loads('{"messages": [{"role": "user", "content": "hi"}]}')
    answer = client.post("/v1/chat/completions", json=body).json
    assert (answer["adapter"], answer["model"]) == ("pirate", "mini")
    assert client.post("/v1/chat/completions", json={**body, "model": "mini"}).json["adapter"] == "base"
