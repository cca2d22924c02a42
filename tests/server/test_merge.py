"""Merging by HTTP: the report, the entries and metrics that show it, what ends it, and what is refused."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flask.testing import FlaskClient

from loraserve.base.load import Base
from loraserve.engine.service import Service
from loraserve.server import create_app
from tests.server.conftest import CHAINS, text_of, write_adapter
from tests.server.test_adapters import says, upload
from tests.server.test_bad_requests import expect


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    """An engine of its own, for its adapters get merged and removed."""
    return make_service()


def metric(client: FlaskClient, name: str) -> float:
    gc.collect()
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"loraserve_engine_{name} ")))


def entry(client: FlaskClient, name: str) -> tuple[bool, int]:
    body = client.get(f"/v1/adapters/{name}").json
    assert body in client.get("/v1/adapters").json["data"]
    return body["merged"], body["merged_bytes"]


def test_a_merged_adapter_answers_from_its_own_layers_and_says_so(client: FlaskClient, base: Base) -> None:
    assert entry(client, "pirate") == (False, 0)
    response = client.post("/v1/adapters/pirate/merge")
    assert response.status_code == 200, response.text
    body = response.json
    size = base.config.vocab_size
    num_bytes = 4 * (size * size + 3 * 8 * size)  # lm_head, and k_proj with q_proj and v_proj beside it
    assert (body["id"], body["merged"], body["merged_bytes"]) == ("pirate", True, num_bytes)
    assert body["merge"]["changed_layers"] == 2 and body["merge"]["untied_lm_head"] is False
    parity = body["merge"]["parity"]
    assert parity["greedy_agreement"] == 1.0 and parity["max_logit_difference"] < 1e-4 < parity["max_logit"]
    assert [probe["answer"] for probe in parity["prompts"]] == [text_of("pirate")] * len(parity["prompts"])
    assert entry(client, "pirate") == (True, num_bytes) and entry(client, "poet") == (False, 0)
    assert (metric(client, "adapters_merged"), metric(client, "merged_bytes")) == (1, num_bytes)
    wanted = {"pirate": "pirate", "poet": "poet", "base": "base", "pirate:0.2": "base", "pirate:0.2+poet": "poet"}
    assert {spec: says(client, spec) for spec in wanted} == {spec: text_of(chain) for spec, chain in wanted.items()}
    assert client.get("/v1/adapters/pirate").json["loaded"], "for pirate:0.2"


def test_merging_and_unmerging_twice_are_the_same_as_once(client: FlaskClient) -> None:
    first = client.post("/v1/adapters/pirate/merge").json["merge"]
    assert client.post("/v1/adapters/pirate/merge").json["merge"] == first
    for _ in range(2):
        response = client.post("/v1/adapters/pirate/unmerge")
        assert response.status_code == 200, response.text
        assert (response.json["id"], response.json["merged"], response.json["merged_bytes"]) == ("pirate", False, 0)
        assert (metric(client, "adapters_merged"), metric(client, "merged_bytes")) == (0, 0)
        assert says(client, "pirate") == text_of("pirate")


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_unknown_adapter_is_not_found(client: FlaskClient, verb: str) -> None:
    expect(client.post(f"/v1/adapters/pirat/{verb}"), 404, "adapter_not_found", None, "did you mean 'pirate'")
    client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    expect(client.post(f"/v1/adapters/pirate/{verb}"), 404, "adapter_not_found", None)


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_another_sites_page_may_not_merge(client: FlaskClient, verb: str) -> None:
    headers = {"Origin": "https://evil.example"}
    expect(client.post(f"/v1/adapters/pirate/{verb}", headers=headers), 403, "forbidden", None)
    assert entry(client, "pirate") == (False, 0)
    own = {"Origin": "http://localhost"}
    assert client.post(f"/v1/adapters/pirate/{verb}", headers=own).status_code == 200


def test_an_adapter_that_is_refused_is_not_merged(client: FlaskClient, service: Service, base: Base) -> None:
    spoiled = {"base_model.model.lm_head.lora_A.weight": torch.full((1, base.config.vocab_size), float("nan"))}
    write_adapter(service.registry.root / "broken", base, CHAINS["pirate"][0], **spoiled)
    error = expect(client.post("/v1/adapters/broken/merge"), 422, "adapter_refused", None, "NaN")
    assert error["problems"] and metric(client, "merged_bytes") == 0


def test_a_merge_that_does_not_fit_is_refused_and_names_the_option(make_service: Callable[..., Service]) -> None:
    client = create_app(make_service(merge_memory=500_000)).test_client()
    size = client.post("/v1/adapters/pirate/merge").json["merged_bytes"]
    assert 250_000 < size < 500_000
    expect(client.post("/v1/adapters/poet/merge"), 409, "conflict", None, "--merge-memory", "(pirate)")
    assert metric(client, "merged_bytes") == size
    assert says(client, "poet") == text_of("poet") and says(client, "pirate") == text_of("pirate")
    client.post("/v1/adapters/pirate/unmerge")
    assert client.post("/v1/adapters/poet/merge").status_code == 200


def test_no_memory_for_merges_allows_none(make_service: Callable[..., Service]) -> None:
    client = create_app(make_service(merge_memory=0)).test_client()
    expect(client.post("/v1/adapters/poet/merge"), 409, "conflict", None, "--merge-memory")
    assert says(client, "poet") == text_of("poet")


def test_a_replaced_removed_or_unloaded_adapter_is_merged_no_longer(
    client: FlaskClient, base: Base, tmp_path: Path
) -> None:
    for name in ("pirate", "poet", "dice"):
        assert client.post(f"/v1/adapters/{name}/merge").status_code == 200
    second = write_adapter(tmp_path / "second", base, CHAINS["poet"][0], r=2)
    body = upload(client, second, "pirate", replace="true").json
    assert (body["version"], body["merged"], body["merged_bytes"]) == (2, False, 0)
    assert says(client, "pirate") == text_of("poet")
    assert client.delete("/v1/adapters/poet").status_code == 200
    client.post("/v1/unload_lora_adapter", json={"lora_name": "dice"})
    assert (metric(client, "adapters_merged"), metric(client, "merged_bytes")) == (0, 0)
