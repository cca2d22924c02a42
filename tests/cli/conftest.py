"""The command line on a tiny base with three adapters: in this process, and as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loraserve.base.load import Base, load_base
from loraserve.cli.main import main
from loraserve.lora.config import LoraConfig
from loraserve.registry import Registry

TARGETS = {"pirate": ["q_proj", "down_proj"], "poet": "all-linear", "head": ["v_proj", "lm_head"]}

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def adapters_dir(base: Base, tmp_path_factory: pytest.TempPathFactory, random_adapter) -> Path:
    """Adapters of different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    registry = Registry(root, base.shapes, base.fingerprint)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        r = 2 + seed
        adapter = random_adapter(base.shapes, targets, r, seed)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(adapter.weights))
        manifest = {"base_fingerprint": base.fingerprint, "description": f"speaks like a {name}"}
        registry.publish(name, adapter, config, manifest)
    return root


@pytest.fixture
def here(base: Base, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory of its own, with the tiny base and its adapters as the defaults."""
    monkeypatch.setenv("LORASERVE_BASE", str(base.path))
    monkeypatch.setenv("LORASERVE_ADAPTERS", str(adapters_dir))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(here: Path) -> Cli:
    """`cli("merge", "pirate", ..., input="...")` in this process."""

    def run(*args: str | Path, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="loraserve", input=input)

    return run


@pytest.fixture
def shell(here: Path) -> Shell:
    """The same as a real process; `before` is a line of shell that sets its limits."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(*args: str | Path, before: str = ":", **options: Any) -> "subprocess.CompletedProcess[str]":
        command = ["bash", "-c", f'{before}; exec "$@"', "-", sys.executable, "-m", "loraserve", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, **options)

    return run
