"""README and quickstart are run as they stand, in both languages, with a tiny base and few dialogues."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraserve.base.load import load_base
from loraserve.cli.main import main
from loraserve.lora.config import LoraConfig
from loraserve.registry import Registry
from tests.conftest import MakeAdapter
from tests.docs.conftest import FENCE, ROOT, Page

ADDRESS = "http://127.0.0.1:8000"
ELSEWHERE = re.compile(r"^(make |source )|jingyaogong/")
"""Lines that install, or that need the hub."""
TUTORIALS = [Page(ROOT / name) for name in ("README.md", "README.zh.md", "docs/quickstart.md", "docs/quickstart.zh.md")]


class Shell:
    """Runs a page's commands one after the other in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server: subprocess.Popen[str] | None = None
        self.url = ADDRESS

    def run(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if words[:2] == ["loraserve", "serve"]:
            self.serve(words[1:])
        elif words[0] == "loraserve":
            result = CliRunner().invoke(main, words[1:], prog_name="loraserve")
            assert result.exit_code == 0, f"{line}\n{result.output}"
            assert result.stdout.strip() or words[1] == "train", f"{line}: says nothing"
        else:
            if words[0] == "curl" and not shutil.which("curl"):
                return
            output = self.process(["bash", "-euo", "pipefail", "-c", line.replace(ADDRESS, self.url)])
            if words[0] == "curl":
                assert '"content"' in output, output

    def python(self, code: str) -> None:
        assert self.process([sys.executable, "-W", "error", "-c", code.replace(ADDRESS, self.url)]).strip()

    def process(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "loraserve", *words, "--port", "0"]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout
        found = re.search(r"http://\S+:\d+", self.server.stdout.readline())
        assert found
        self.url = found[0]

    def close(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.communicate()


@pytest.fixture
def shell(
    tmp_path: Path, tiny_base_dir: Path, random_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    """A directory like the repository's, with the tiny base in place of the bundled one.

    Its context is short, for a random base seldom ends an answer before the context does.
    """
    base_dir = shutil.copytree(tiny_base_dir, tmp_path / "tiny")
    config = json.loads((base_dir / "config.json").read_text("utf-8")) | {"max_position_embeddings": 256}
    (base_dir / "config.json").write_text(json.dumps(config), "utf-8")
    base = load_base(str(base_dir), device="cpu", dtype="float32")
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    for seed, name in enumerate(("lumi", "pirate", "poet")):
        adapter = random_adapter(base.shapes, "all-linear", 2 + seed, seed)
        lora = LoraConfig(r=2 + seed, lora_alpha=4 + 2 * seed, target_modules=sorted(adapter.weights))
        registry.publish(name, adapter, lora, {"base_fingerprint": base.fingerprint})
    data = tmp_path / "examples" / "data" / "lumi.jsonl"
    data.parent.mkdir(parents=True)
    rows = (ROOT / "examples" / "data" / "lumi.jsonl").read_text("utf-8").splitlines(keepends=True)
    data.write_text("".join(rows[:: len(rows) // 12]), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LORASERVE_BASE", str(base_dir))
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=str)
def test_the_tutorial_works_as_written(page: Page, shell: Shell) -> None:
    ran = 0
    if page.path.stem.startswith("README"):
        shell.serve(["serve"])
    for language, code in FENCE.findall(page.text):
        if language == "bash":
            for line in (line for line in code.replace("\\\n", " ").splitlines() if line and not line.startswith("#")):
                if not ELSEWHERE.search(line):
                    shell.run(line)
                    ran += 1
        elif language == "python" and "openai" in code:
            shell.python(code)
            ran += 1
    assert ran >= 5
    assert (shell.directory / "adapters" / "nova" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "docs/python.md"])
def test_the_python_example_works_on_what_is_shipped(name: str, tmp_path: Path) -> None:
    adapters = shutil.copytree(ROOT / "adapters", tmp_path / "adapters")
    shipped = set(adapters.rglob("*"))
    code = next(code for code in Page(ROOT / name).blocks("python") if "from loraserve import LLM" in code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(set(answers)) >= 3, "base and adapters answer differently"
    assert set(adapters.rglob("*")) == shipped, "using the shipped adapters leaves them as they were"
