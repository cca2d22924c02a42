"""docs/http.md lists exactly the routes, fields and metrics that the server has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask

from loraserve.base.load import load_base
from loraserve.engine.service import Service
from loraserve.registry import Registry
from loraserve.server import create_app
from loraserve.server.job_schema import CreateJob, Hyperparameters
from loraserve.server.problems import STATUS
from loraserve.server.schema import ChatCompletion, Completion, LoadAdapter, UnloadAdapter
from tests.docs.conftest import ROOT, Page

PAGE = Page(ROOT / "docs" / "http.md")


@pytest.fixture(scope="module")
def app(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
    registry = Registry(tmp_path_factory.mktemp("adapters"), base.shapes, base.fingerprint)
    service = Service(base, registry, max_model_len=64, max_num_seqs=1)
    service.start()
    yield create_app(service)
    service.stop()


def routes_of(app: Flask) -> set[str]:
    found = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"<\1>", rule.rule)
        found |= {f"{method} {path}" for method in rule.methods or () if method not in ("HEAD", "OPTIONS")}
    return found


def test_every_route_has_a_section_and_every_section_a_route(app: Flask) -> None:
    headings = {heading.replace("\\", "") for heading in PAGE.headings}
    documented = {heading for heading in headings if re.match(r"(GET|POST|PUT|PATCH|DELETE) ", heading)}
    assert documented == routes_of(app)


def test_the_table_at_the_top_has_every_route(app: Flask) -> None:
    assert set(re.findall(r"^\| \[`([A-Z]+ [^`]+)`\]", PAGE.text, re.MULTILINE)) == routes_of(app)


def test_every_field_is_documented() -> None:
    words = set(re.findall(r"`(\w+)`|\"(\w+)\":", PAGE.text))
    known = {word for pair in words for word in pair}
    bodies = (ChatCompletion, Completion, LoadAdapter, UnloadAdapter, CreateJob, Hyperparameters)
    fields = {name for body in bodies for name in body.model_fields}
    assert len(fields) > 30
    assert fields - known == set()


def test_every_metric_is_documented_and_no_other(app: Flask) -> None:
    client = app.test_client()
    client.get("/health")
    scraped = re.findall(r"^# TYPE (loraserve_\w+) (\w+)", client.get("/metrics").text, re.MULTILINE)
    names = {name for name, _ in scraped if not name.endswith("_created")}
    assert set(re.findall(r"`(loraserve_\w+)`", PAGE.text)) == names


def test_every_status_of_an_error_is_documented() -> None:
    errors = PAGE.text.partition("## Errors")[2]
    assert set(map(str, STATUS.values())) <= set(re.findall(r"\b[45]\d\d\b", errors))
