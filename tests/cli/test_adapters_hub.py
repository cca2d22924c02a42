"""`loraserve adapters push` and `pull` against a hub of the tests' own."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from loraserve.registry import Registry
from tests.base.hub import Hub

ROOT = Path(__file__).parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


class WritableHub(Hub):
    """Takes commits of small files as well; only the token `hf_good` may write."""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub, reading = self, super()._handler()

        class Handler(reading):  # type: ignore[misc, valid-type]
            def do_POST(self) -> None:
                body = self._body()
                hub.log.append(f"POST {self.path}")
                if self.headers.get("Authorization") != "Bearer hf_good":
                    return self._send(403, b'{"error": "no"}')
                answer: dict[str, object] = {}
                if self.path.endswith("/repos/create"):
                    asked = json.loads(body)
                    answer = {"url": f"https://huggingface.co/{asked['organization']}/{asked['name']}"}
                elif "/preupload/" in self.path:
                    modes = {"uploadMode": "regular", "shouldIgnore": False}
                    answer = {"files": [{"path": file["path"]} | modes for file in json.loads(body)["files"]]}
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
                    name = "/".join(self.path.split("/")[3:5])
                    commit = hub.add(name, {path: base64.b64decode(text) for path, text in files.items()})
                    answer = {"commitOid": commit, "commitUrl": f"https://huggingface.co/{name}/commit/{commit}"}
                return self._send(200, json.dumps(answer).encode())

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

        return Handler


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with WritableHub() as hub:
        yield hub


@pytest.fixture
def run(hub: WritableHub, adapters_dir: Path, tmp_path: Path) -> Run:
    """A command line of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_good"}
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT), "LORASERVE_ADAPTERS": str(adapters_dir)}

    def command(*args: str | Path, **changed: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "loraserve", "adapters", *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, env=environment | changed, cwd=tmp_path)

    return command


def test_pushed_adapter_is_pulled_bit_by_bit(run: Run, hub: WritableHub, adapters_dir: Path, tmp_path: Path) -> None:
    pushed = run("push", "poet", "someone/poet-lora")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"adapter 'poet' pushed to {hub.url}/someone/poet-lora\n"
    pulled = run("pull", "someone/poet-lora", "--adapters-dir", tmp_path / "other")
    assert pulled.returncode == 0, pulled.stderr
    assert "adapter 'poet-lora' pulled from someone/poet-lora as version 1" in pulled.stdout
    there, here = Registry(tmp_path / "other"), Registry(adapters_dir)
    assert there.load("poet-lora").digest == here.load("poet").digest
    assert there.get("poet-lora").manifest == here.get("poet").manifest


def test_what_cannot_be_pulled_says_why(run: Run, hub: WritableHub, tmp_path: Path) -> None:
    hub.add("someone/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"})
    hub.add("someone/model", {"config.json": b"{}", "README.md": b"# a base"})
    for hub_id, reason in {
        "someone/pickled": "adapter_model.bin is a pickle and is not taken",
        "someone/model": "the repository has no adapter_config.json",
        "someone/nothing": "no such repository on the hub",
        "someone/model@v9": "this revision does not",
        "nonsense": "is not a hub id",
    }.items():
        result = run("pull", hub_id, "--adapters-dir", tmp_path / "other")
        assert result.returncode == (2 if hub_id == "nonsense" else 1)
        assert reason in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert not any(line.startswith("GET") and line.endswith("adapter_model.bin") for line in hub.log)
    assert Registry(tmp_path / "other").names() == []


def test_push_needs_a_token_that_may_write(run: Run, hub: WritableHub) -> None:
    result = run("push", "poet", "someone/poet-lora", HF_TOKEN="hf_bad")
    assert result.returncode == 1
    assert "hf auth login" in result.stderr
    assert "someone/poet-lora" not in hub.repos
    assert run("push", "nope", "someone/x").returncode == 1
